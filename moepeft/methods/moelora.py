"""MOELoRA: LoRA split into experts that a task's gate weighs.

Paper: Liu et al., When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical Applications,
arXiv 2310.18339, equations 5 to 8.
Release: liuqidong07/MOELoRA-peft, commit 2d9efa4e (MIT).

    w_t = softmax(gate e_t)                       e_t (d_t): embedding of task t; gate (E, d_t), no bias
    y = W0 x + (alpha / r) sum_i w_t[i] B_i A_i x     E experts of rank r / E; note the scale: r is the total rank

Differences between paper and release (the release computes the equations; preset `released` is its recipe):
* one gate and one task table serve all layers, in the paper and in the class that the release's `main.py` trains. The
  release has another class with a gate per layer, which its code cannot reach: ``gate="per_site"``, preset `per_site`;
* the release broadcasts gates along dimension 1. Its model, ChatGLM, is sequence-first: dimension 1 holds the rows, so
  the release gates rows. On a batch-first model its code gates positions. ``layout="sequence_first"`` is for models
  like ChatGLM;
* in the release every layer carries an unused gate and table of its own, and row 0 of the table is padding. Neither is
  reproduced: they change no number. Here tasks count from 0, and -1 pads rows of several tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moepeft.config import MethodConfig, Recipe
from moepeft.context import SiteContext
from moepeft.errors import ConfigError
from moepeft.fast import has_fast_path
from moepeft.methods._fast import moelora as _fast
from moepeft.methods._released.moelora import RECIPES
from moepeft.methods._validation import check_choices, check_count, check_dropout, check_positive
from moepeft.ops.draws import normal, uniform
from moepeft.ops.linear import at_least_twice, dropout_of, per_row
from moepeft.ops.precision import without_autocast
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class MOELoRA(MethodConfig):
    """Configuration of MOELoRA.

    Attributes:
        rank: total rank r; each expert has rank r / num_experts.
        alpha: numerator of the scale alpha / r.
        num_experts: number of experts E, a divisor of `rank`.
        num_tasks: number of tasks T.
        task_dim: width d_t of the task embeddings.
        gate: one gate for all sites, or one each.
        layout: which dimension of the input holds the rows.
        dropout: probability of dropping an input feature of the adapter while training.
    """

    name: ClassVar[str] = "moelora"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "released": {"dropout": 0.1},
        "per_site": {"gate": "per_site"},
    }
    recipes: ClassVar[Mapping[str, Recipe]] = RECIPES
    sizes: ClassVar[tuple[str, ...]] = ("rank", "num_experts")

    rank: int = 16
    alpha: float = 32.0
    num_experts: int = 8
    num_tasks: int = 1
    task_dim: int = 64
    gate: Literal["shared", "per_site"] = "shared"
    layout: Literal["batch_first", "sequence_first"] = "batch_first"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for field in ("rank", "num_experts", "num_tasks", "task_dim"):
            check_count("MOELoRA", field, getattr(self, field))
        check_positive("MOELoRA", "alpha", self.alpha)
        check_choices("MOELoRA", self)
        check_dropout("MOELoRA", self.dropout)
        if self.rank % self.num_experts:
            following = self.num_experts * (self.rank // self.num_experts + 1)
            raise ConfigError(
                f"MOELoRA: rank={self.rank} is not a multiple of num_experts={self.num_experts}, but every expert has "
                f"rank rank / num_experts: the next that fits is {following}"
            )

    @property
    def capabilities(self) -> Capabilities:
        """Routes by task, so it merges per task."""
        return Capabilities(routing="task", batch_first=self.layout == "batch_first")

    def shared(self, sites: Sequence[LinearSite]) -> nn.Module | None:
        """The gate and the task table, if all sites share them."""
        return TaskGate(self) if self.gate == "shared" else None

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """The experts of one site, and its gate if it has its own."""
        assert shared is None or isinstance(shared, TaskGate)
        return MOELoRAAdapter(site, self, shared)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """r (in + out) per site, and d_t (E + T) per gate."""
        gates = 1 if self.gate == "shared" else len(sites)
        factors = sum(self.rank * (site.in_features + site.out_features) for site in sites)
        return factors + gates * self.task_dim * (self.num_experts + self.num_tasks)

    def prepare(self, adapters: Sequence[nn.Module], task_sets: Tensor | None) -> Sequence[Weights]:
        """The weights of the experts, where all sites share the gate."""
        first = adapters[0]
        assert isinstance(first, MOELoRAAdapter)
        return [first.weights(task_sets)] * len(adapters) if self.gate == "shared" and task_sets is not None else ()


class TaskGate(nn.Module):
    """Task table (T, d_t) and gate (E, d_t)."""

    def __init__(self, config: MOELoRA) -> None:
        super().__init__()
        self.task_embedding = nn.Parameter(normal((config.num_tasks, config.task_dim), 1.0))
        self.gate = nn.Parameter(uniform((config.num_experts, config.task_dim), config.task_dim**-0.5))

    def forward(self, tasks: Int[Tensor, "rows ids"]) -> Float[Tensor, "rows experts"]:
        """Weights of the experts; a row of several tasks has the mean of their embeddings, -1 pads."""
        alone = tasks.shape[1] == 1
        if alone:  # a product of all tasks: its last bits do not depend on the number of rows
            embedding = at_least_twice(self.task_embedding)
        else:
            present = (tasks >= 0).to(self.gate.dtype).unsqueeze(-1)
            embedding = (F.embedding(tasks.clamp(min=0), self.task_embedding) * present).sum(1) / present.sum(1)
        with without_autocast(self.gate):
            weights = F.linear(embedding, self.gate).softmax(dim=-1)
        return weights.index_select(0, tasks[:, 0]) if alone else weights


class Weights(NamedTuple):
    """Weights of rows, with alpha / r: of the experts, and of the rank-one terms, of which every expert has r/E."""

    experts: Float[Tensor, "rows experts"]
    terms: Float[Tensor, "rows r"]


@has_fast_path(_fast.add_experts)
def add_experts(
    y: Float[Tensor, "rows *n o"],
    x: Float[Tensor, "rows *n i"],
    A: Float[Tensor, "r i"],
    B: Float[Tensor, "o r"],
    w: Float[Tensor, "rows experts"],
    terms: Float[Tensor, "rows r"] | None = None,
) -> Float[Tensor, "rows *n o"]:
    """y + sum_i w_i B_i A_i x: expert i owns rows i r/E to (i+1) r/E of the rank; w_i of each row, with alpha / r.

    `terms` is w with each weight r/E times: a fast path reads the weights of the rank so.
    """
    experts = w.shape[1]
    for A_i, B_i, w_i in zip(A.chunk(experts), B.chunk(experts, dim=1), w.T, strict=True):
        output = F.linear(F.linear(x, A_i.to(x.dtype)), B_i.to(x.dtype))
        y = y + (per_row(w_i[:, None], output) * output).to(y.dtype)
    return y


class MOELoRAAdapter(nn.Module):
    """The experts of one site, stacked along the rank: A (r, in), B (out, r)."""

    def __init__(self, site: LinearSite, config: MOELoRA, shared: TaskGate | None) -> None:
        super().__init__()
        self.scale = config.alpha / config.rank
        self.expert_rank = config.rank // config.num_experts
        self.A = nn.Parameter(normal((config.rank, site.in_features), 0.01))
        self.B = nn.Parameter(uniform((site.out_features, config.rank), 0.0))
        self.dropout = dropout_of(config.dropout)
        self.own_gate = TaskGate(config) if shared is None else None
        self._gate = (self.own_gate or shared,)  # in a tuple: the shared gate is registered once, elsewhere

    @property
    def gate(self) -> TaskGate:
        """The gate this site is weighed by."""
        gate = self._gate[0]
        assert gate is not None
        return gate

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus the experts' weighted sum."""
        y = base(x)
        w, terms = self._weights(x, ctx)
        return add_experts(y, self.dropout(x), self.A, self.B, w, terms)

    def weights(self, task_sets: Int[Tensor, "rows ids"]) -> Weights:
        """alpha / r times the gate's weights."""
        w: Tensor = self.scale * self.gate(task_sets)
        return Weights(w, w.repeat_interleave(self.expert_rank, dim=1))

    def _weights(self, x: Tensor, ctx: SiteContext) -> Weights:
        """`weights` of the input's rows; those of a shared gate are made once in a forward."""
        rows, made = x.shape[0], ctx.prepared
        if made is None:
            made = self.weights(ctx.task_sets(rows))
        w, terms = (ctx.spread(each, rows) for each in made)
        ctx.stat("gates", lambda: w / self.scale)
        return Weights(w, terms)

    def delta_weight(self, task: int | None) -> Float[Tensor, "o i"]:
        """(alpha / r) B diag(w_t) A."""
        A, B = self.lora_factors(task)
        return B @ A * self.scale

    def lora_factors(self, task: int | None) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        """A and B diag(w_t)."""
        gates = self.gate(torch.tensor([[task]], device=self.A.device))
        return self.A, self.B * gates.repeat_interleave(self.expert_rank, dim=-1)
