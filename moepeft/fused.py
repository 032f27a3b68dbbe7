"""Experts of a mixture whose matrices are one parameter, as transformers 5 holds those of Mixtral, Qwen3-MoE or OLMoE.

    y = sum_k w_k D_e act(U_e x)        e: the k-th expert that the router chose for the token, w_k: its weight

U (experts, inner, features), gate and up in one matrix, and D (experts, features, inner) are parameters of one module,
which its own `forward` multiplies by. So each expert's matrix is a site of its own, `ExpertMatrix` stands for it on
the adapted model, and `mix` computes the equation, expert by expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Project = Callable[[str, int, Tensor, Tensor], Tensor]
"""Name of a parameter, index of the expert, input (n, in), which tokens the input is of (n,) -> (n, out)."""

_ARGUMENTS = (
    ("self", "hidden_states", "top_k_index", "top_k_weights"),
    ("self", "hidden_states", "router_indices", "routing_weights"),
)
# What `use_experts_implementation` of transformers says of a module.
_DECLARED = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed")


class Fused(NamedTuple):
    """Where an expert's matrix is.

    Attributes:
        module: dotted path of the module that holds all experts.
        parameter: name of the parameter in it.
        expert: its number.
    """

    module: str
    parameter: str
    expert: int


def fused_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that hold the matrices of all experts, in the order of their use; none elsewhere."""
    if not all(hasattr(module, name) for name in _DECLARED):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    matrices = [module._parameters.get(name) for name in names]
    takes = tuple(inspect.signature(type(module).forward).parameters)
    known = takes in _ARGUMENTS and all(matrix is not None and matrix.dim() == 3 for matrix in matrices)
    return names if known else ()


def expert_shapes(module: nn.Module) -> Iterator[tuple[int, str, int, int]]:
    """Index, parameter, in_features and out_features of every expert's matrix, expert by expert."""
    names = fused_parameters(module)
    if not names:
        return
    sides = {name: tuple(module.get_parameter(name).shape) for name in names}
    for index in range(sides[names[0]][0]):
        for name in names:
            _, out, into = sides[name]
            yield (index, name, out, into) if module.is_transposed else (index, name, into, out)


class ExpertMatrix(nn.Module):
    """Stands for one expert's matrix on an adapted model. It has no parameters: the experts keep theirs."""

    def __init__(self, experts: nn.Module, parameter: str, index: int) -> None:
        super().__init__()
        self._experts = (experts,)  # in a tuple: the experts are registered once, elsewhere
        self.parameter = parameter
        self.index = index

    @property
    def experts(self) -> nn.Module:
        """The module that holds all experts."""
        return self._experts[0]

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The matrix: a view of the parameter, through which it can be written."""
        matrix = self.experts.get_parameter(self.parameter)[self.index]
        return matrix.T if self.experts.is_transposed else matrix

    def forward(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
        """What the expert's own projection computes."""
        return project(self.experts, self.parameter, self.index, x)


def project(experts: nn.Module, parameter: str, index: int, x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
    """The frozen projection of one expert."""
    matrix = experts.get_parameter(parameter)[index]
    bias = experts.get_parameter(f"{parameter}_bias")[index] if experts.has_bias else None
    return F.linear(x, matrix.T if experts.is_transposed else matrix, bias)


def mix(
    experts: Any,
    project: Project,
    x: Float[Tensor, "tokens d"],
    chosen: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
) -> Float[Tensor, "tokens d"]:
    """The module's equation with `project` in place of its matrices.

    The host waits for the numbers of the experts that were chosen. A number beyond the experts, as expert parallelism
    has for experts of other processes, adds nothing.
    """
    first, last = fused_parameters(experts)
    number = len(experts.get_parameter(last))
    total = torch.zeros_like(x)
    for index in torch.unique(chosen).tolist():
        if index >= number:
            continue
        tokens, place = torch.where(chosen == index)
        inner = project(first, index, x[tokens], tokens)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        y = project(last, index, inner, tokens)
        if experts.has_post_expert_norm:
            y = experts.post_expert_norm(y)
        total.index_add_(0, tokens, (y * weights[tokens, place, None]).to(total.dtype))
    return total


class ExpertMatrices(nn.ModuleDict):
    """What the module of all experts carries on an adapted model: its adapted matrices, by expert and parameter.

    Args:
        inner: the `forward` that another library had bound on the module before.
    """

    def __init__(self, inner: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.inner = inner

    def place(self, experts: nn.Module, where: Fused) -> ExpertMatrix:
        """Make what stands for a matrix."""
        matrix = ExpertMatrix(experts, where.parameter, where.expert)
        if str(where.expert) not in self:
            self[str(where.expert)] = nn.ModuleDict()
        self[str(where.expert)].add_module(where.parameter, matrix)
        return matrix

    def find(self, parameter: str, index: int) -> nn.Module | None:
        """What stands for a matrix; None if the matrix carries no adapter."""
        of_expert = self._modules.get(str(index))
        return None if of_expert is None else of_expert._modules.get(parameter)

    def matrices(self) -> Iterator[nn.Module]:
        """All of them."""
        for of_expert in self.values():
            yield from of_expert.children()
