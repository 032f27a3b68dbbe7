"""Fast paths of `moepeft.ops.linear`: backward passes by hand, with fewer kernels than autograd's own.

Each can be differentiated once. `moepeft.fast_paths(False)` computes by the definitions, which have no such limit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def unit(x: Tensor, first: int = 0) -> Tensor:
    """Fast path of `moepeft.ops.linear.unit`: a third of the kernels."""
    scaled: Tensor = _Unit.apply(x, tuple(range(first, x.dim())))  # type: ignore[no-untyped-call]
    return scaled


class _Unit(torch.autograd.Function):
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


def with_row_mean(x: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Fast path of `moepeft.ops.linear.with_row_mean`: both gradients of x are put together in one pass.

    Autograd's own backward of the mean is a product with one inner index, which is slow.
    """
    if x.dim() == 2:
        return x, x
    same, mean = _WithWeightedSum.apply(x, shares)  # type: ignore[no-untyped-call]
    return same, mean


class _WithWeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        return x, (weight.unsqueeze(1) @ x.flatten(1, -2)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_x: Tensor, of_sum: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return torch.addcmul(of_x.flatten(1, -2), weight.unsqueeze(2), of_sum.unsqueeze(1)).reshape(of_x.shape), None
