"""Fast path of `moepeft.ops.linear.with_row_mean`: a backward pass by hand. It can be differentiated once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_row_mean(x: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """x, and the mean: both gradients of x are put together in one pass.

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
