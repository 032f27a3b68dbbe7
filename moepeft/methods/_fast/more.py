"""Fast path of MoRE's selector: its gradient is put in its place by one scatter. Can be differentiated once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def term_weights(p: Tensor, ladder: Tensor, unit: float) -> Tensor:
    """Fast path of `moepeft.methods.more.term_weights`."""
    weights: Tensor = _TermWeights.apply(p, ladder, unit)  # type: ignore[no-untyped-call]
    return weights


class _TermWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, ladder: Tensor, unit: float) -> Tensor:
        choice = p.argmax(dim=-1)
        weights = ladder.index_select(0, choice).to(p.dtype) * unit
        ctx.save_for_backward(choice, weights)
        ctx.ranks = p.shape[-1]
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        choice, weights = ctx.saved_tensors
        of_chosen = (gradient * weights).sum(dim=-1, keepdim=True)
        nothing = weights.new_zeros(len(weights), ctx.ranks)
        return nothing.scatter_(-1, choice.unsqueeze(-1), of_chosen), None, None
