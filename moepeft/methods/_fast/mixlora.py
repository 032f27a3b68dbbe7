"""Fast paths of MixLoRA's projections.

An FFN is linear, element-wise, linear. The frozen product of an inward projection is the same for all experts, and is
computed once. The outward projection is linear, so the streams are summed with their weights in front of it, and the
frozen product is computed once again.

**On a CPU** each expert multiplies the tokens that chose it and no others: k / E of the products. It reads which these
are, for which a GPU would have to wait, and goes expert by expert, which pays from some hundred tokens.

**Elsewhere** the choice of expert is a mask on the concatenated rank space of all experts: no gather, no loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moepeft.fast import is_recorded
from moepeft.ops.linear import add_linear, computing_type
from moepeft.ops.precision import without_autocast
from moepeft.protocols import Base

Pairs = tuple[Tensor, Tensor, float]
"""`moepeft.methods.mixlora.Pairs`: A, B, scale."""
Rows = Sequence[Tensor]
"""Of every expert, which of the streams' tokens chose it; the streams stand one after another."""

FEW_TOKENS = 512
"""With fewer tokens in all streams together, a loop over experts takes longer than the products that it saves."""


class Ready(NamedTuple):
    """What is made of the choice of an FFN's experts, once for all of the FFN's projections.

    Attributes:
        rows: of every expert, where each multiplies its own; else none.
        mask: else, of the concatenated rank space of all experts, (k, *n, E r): the scale alpha / r where the expert is
            that of the stream's token, and zero elsewhere.
    """

    rows: Rows
    mask: Tensor | None


Choice = tuple[Tensor, Tensor, Tensor, Ready | None]
"""`moepeft.methods.mixlora.Choice`: indices, weights, experts, ready."""


def make_ready(choice: Choice, rank: int, scale: float, kind: torch.dtype) -> Ready:
    """What is ready: rows where each expert is to multiply its own tokens alone.

    Args:
        choice: of an FFN's input.
        rank: of every expert.
        scale: alpha / r.
        kind: type of the products.
    """
    indices, _, experts, _ = choice
    if indices.device.type != "cpu" or indices.numel() < FEW_TOKENS or is_recorded():
        return Ready((), (scale * experts.to(kind)).repeat_interleave(rank, dim=-1))
    chosen = indices.movedim(-1, 0).flatten()
    counts = torch.bincount(chosen, minlength=experts.shape[-1]).tolist()
    return Ready(torch.split(chosen.argsort(stable=True), counts), None)


def project_in(y: Tensor, x: Tensor, pairs: Pairs | None, choice: Choice) -> Tensor:
    """Fast path of `moepeft.methods.mixlora.project_in`."""
    indices, _, experts, _ = choice
    if pairs is None:
        return y.repeat(len(experts), *(1,) * y.dim())
    A, B, scale = pairs
    rows, mask = _ready(choice, pairs, x)
    down = F.linear(x, A.to(x.dtype))
    if mask is not None:
        return add_linear(y, down * mask, B)
    of_experts = torch.unflatten(down * scale, -1, (experts.shape[-1], -1)).unsqueeze(0)
    chosen = torch.take_along_dim(of_experts, indices.movedim(-1, 0)[..., None, None], dim=-2).squeeze(-2)
    return _by_experts(chosen, B, rows, dim=1).to(y.dtype).add_(y)


def project_out(base: Base, h: Tensor, x: Tensor, pairs: Pairs | None, choice: Choice) -> Tensor:
    """Fast path of `moepeft.methods.mixlora.project_out`."""
    indices, weights, experts, _ = choice
    weights = weights.to(h.dtype)
    y = base((h * weights).sum(dim=0))
    if pairs is None:
        return y
    A, B, scale = pairs
    rows, mask = _ready(choice, pairs, x)
    if mask is not None:
        return add_linear(y, (F.linear(x, A.to(x.dtype)) * (weights * mask)).sum(dim=0), B)
    down = (_by_experts(x, A, rows, dim=0) * (scale * weights)).movedim(0, -2)
    space = down.new_zeros(*indices.shape[:-1], experts.shape[-1], down.shape[-1])
    return add_linear(y, space.scatter(-2, indices.unsqueeze(-1).expand(down.shape), down).flatten(-2), B)


def _ready(choice: Choice, pairs: Pairs, x: Tensor) -> Ready:
    """What is ready, or is made here where a definition's choice comes."""
    A, _, scale = pairs
    return choice[3] or make_ready(choice, len(A) // choice[2].shape[-1], scale, computing_type(x))


def _by_experts(x: Tensor, weight: Tensor, rows: Rows, dim: int) -> Tensor:
    """Every token (k, *n, i) times the transposed matrix of its expert, a part of `weight` along `dim`."""
    kind = computing_type(x)
    multiplied: Tensor = _ByExperts.apply(x.flatten(0, -2).to(kind), weight.to(kind), rows, dim)  # type: ignore[no-untyped-call]
    return multiplied.view(*x.shape[:-1], -1)


class _ByExperts(torch.autograd.Function):
    """The products of the rows of x, each with the transposed part of the weight that its group has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Rows, dim: int) -> Tensor:
        ctx.save_for_backward(x, weight, *rows)
        ctx.dim = dim
        parts = weight.chunk(len(rows), dim)
        output = x.new_empty(len(x), parts[0].shape[0])
        with without_autocast(x):
            for own, part in zip(rows, parts, strict=True):
                output.index_copy_(0, own, x.index_select(0, own) @ part.T)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, *rows = ctx.saved_tensors
        of_x, of_weight = torch.empty_like(x), torch.empty_like(weight)
        parts = zip(rows, weight.chunk(len(rows), ctx.dim), of_weight.chunk(len(rows), ctx.dim), strict=True)
        with without_autocast(x):
            for own, part, of_part in parts:
                of_output = grad.index_select(0, own)
                of_x.index_copy_(0, own, of_output @ part)
                of_part.copy_(of_output.T @ x.index_select(0, own))
        return of_x, of_weight, None, None
