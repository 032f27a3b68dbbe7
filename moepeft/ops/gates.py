"""Gates of experts from a router's logits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def top_k_gates(logits: Float[Tensor, "*n experts"], k: int) -> Float[Tensor, "*n experts"]:
    """Softmax over the `k` largest logits, zero elsewhere: dense, so that no step gathers by expert.

    Ties are cut as `torch.topk` cuts them, so that exactly `k` gates are open.
    """
    chosen = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, chosen.indices, chosen.values.softmax(dim=-1))
