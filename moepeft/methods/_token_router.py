"""What methods share whose experts are low-rank pairs of one linear layer, weighed token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def probabilities(x: Float[Tensor, "*n i"], router: Float[Tensor, "experts i"]) -> Float[Tensor, "*n experts"]:
    """softmax(W x) per token, in the router's precision: half precision would make ties of near experts."""
    with torch.autocast(device_type=x.device.type, enabled=False):
        return F.linear(x.to(router.dtype), router).softmax(dim=-1)
