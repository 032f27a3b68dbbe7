"""Fast paths of MixLoRA's projections.

An FFN is linear, element-wise, linear. The frozen product of an inward projection is the same for all experts, and is
computed once. The choice of expert is a mask on the concatenated rank space of all experts. The outward projection is
linear, so the streams are summed with their weights in front of it, and the frozen product is computed once again. No
gather, no loop over experts.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moepeft.ops.linear import add_linear
from moepeft.protocols import Base

Pairs = tuple[Tensor, Tensor, float]
"""`moepeft.methods.mixlora.Pairs`: A, B, scale."""
Choice = tuple[Tensor, Tensor, Tensor]
"""`moepeft.methods.mixlora.Choice`: indices, weights, experts."""


def project_in(y: Tensor, x: Tensor, pairs: Pairs | None, choice: Choice) -> Tensor:
    """Fast path of `moepeft.methods.mixlora.project_in`."""
    _, _, experts = choice
    if pairs is None:
        return y.repeat(len(experts), *(1,) * y.dim())
    A, B, scale = pairs
    down = F.linear(x, A.to(x.dtype)) * scale
    return add_linear(y, down * _rank_mask(experts, down), B)


def project_out(base: Base, h: Tensor, x: Tensor, pairs: Pairs | None, choice: Choice) -> Tensor:
    """Fast path of `moepeft.methods.mixlora.project_out`."""
    _, weights, experts = choice
    weights = weights.to(h.dtype)
    y = base((h * weights).sum(dim=0))
    if pairs is None:
        return y
    A, B, scale = pairs
    down = F.linear(x, A.to(x.dtype)) * (scale * weights)
    return add_linear(y, (down * _rank_mask(experts, down)).sum(dim=0), B)


def _rank_mask(experts: Tensor, down: Tensor) -> Tensor:
    """The choice of expert as a factor on the concatenated rank space, (k, ..., E r)."""
    return experts.to(down.dtype).repeat_interleave(down.shape[-1] // experts.shape[-1], dim=-1)
