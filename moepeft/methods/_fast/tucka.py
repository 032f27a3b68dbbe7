"""Fast path of TuckA: T = U M U^T is never built; x U, then M, then U^T, each as wide as the rank.

The factors' norms have a backward pass by hand, which can be differentiated once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moepeft.ops.linear import add_linear

Factors = tuple[Tensor, Tensor, Tensor]
"""`moepeft.methods.tucka.Factors`: core, factor, mixing."""


def correct_input(x: Tensor, factors: Factors, group: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Fast path of `moepeft.methods.tucka.correct_input`."""
    core, U, mixing = factors
    mixed = weights @ unit(mixing)
    M = torch.einsum("bq,bqxy->bxy", mixed, unit(core, first=1).index_select(0, group)) * alpha
    if M.shape[0] not in (1, x.shape[0]):  # beam search repeated the rows after they were routed
        M = M.repeat_interleave(x.shape[0] // M.shape[0], dim=0)
    factor = unit(U).to(x.dtype)
    down = F.linear(x, factor.T)
    M = M.to(down.dtype)
    if M.shape[0] == 1:
        return add_linear(x, down, factor @ M.squeeze(0).T)
    return add_linear(x, torch.einsum("b...x,bxy->b...y", down, M), factor)


def unit(x: Tensor, first: int = 0) -> Tensor:
    """x over its Euclidean norm, taken over the dimensions from `first` on."""
    scaled: Tensor = _Unit.apply(x, tuple(range(first, x.dim())))  # type: ignore[no-untyped-call]
    return scaled


class _Unit(torch.autograd.Function):
    """A third of the kernels of autograd's backward of a norm and a division."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
        scaled: Tensor = x / norm
        ctx.save_for_backward(scaled, norm)
        ctx.dims = dims
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        scaled, norm = ctx.saved_tensors
        along = (gradient * scaled).sum(dim=ctx.dims, keepdim=True)
        return torch.addcmul(gradient, scaled, along, value=-1) / norm, None
