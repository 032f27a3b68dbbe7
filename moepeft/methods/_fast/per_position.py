"""Fast paths of methods whose rows have factors of their own, for inputs without positions, as packed rows are.

Gathered, the factors of every position would take more memory than a batch of rows by the width of the layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_per_task(x: Tensor, A: Tensor, B: Tensor, tasks: Tensor) -> Tensor:
    """`moepeft.methods.lora_per_task.update`: the factors of all tasks side by side, those of other tasks times 0."""
    if x.dim() > 2:
        return torch.einsum("b...r,bor->b...o", torch.einsum("b...i,bri->b...r", x, A[tasks]), B[tasks])
    own = F.one_hot(tasks, len(A)).to(x.dtype).repeat_interleave(A.shape[1], dim=1)
    return F.linear(F.linear(x, A.flatten(0, 1)) * own, B.movedim(0, 1).flatten(1))


def mtl_lora(x: Tensor, A: Tensor, transforms: Tensor, B: Tensor, v: Tensor) -> Tensor:
    """`moepeft.methods.mtl_lora.update`: the heads side by side, each reads the low-rank input times its weight."""
    low = torch.einsum("b...r,bqr->b...q", F.linear(x, A), transforms)
    if x.dim() > 2:
        return torch.einsum("b...r,bor->b...o", low, torch.einsum("bn,nor->bor", v, B))
    return F.linear((v.unsqueeze(2) * low.unsqueeze(1)).flatten(1), B.movedim(0, 1).flatten(1))
