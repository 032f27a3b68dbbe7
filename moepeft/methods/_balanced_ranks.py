"""What methods share that balance the ranks of a LoRA by a bias instead of a loss."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def count_tokens(
    chosen: Bool[Tensor, "rows *positions r"], mask: Bool[Tensor, "rows tokens"] | None
) -> Float[Tensor, "r"]:
    """How many tokens opened each rank; padding is left out under a mask."""
    flat = chosen.flatten(0, -2)
    return (flat if mask is None else flat & mask.reshape(-1, 1)).sum(dim=0).to(torch.float32)


def move_towards_idle(bias: Float[Tensor, "r"], counts: Float[Tensor, "r"], rate: float) -> None:
    """b_j += rate sign(mean(c) - c_j), in place."""
    bias.add_(rate * (counts.mean() - counts).sign().to(bias.dtype))
