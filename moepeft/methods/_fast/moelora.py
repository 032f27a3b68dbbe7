"""Fast path of MOELoRA.

Stacked, the experts are one LoRA of rank r whose rank space is multiplied by w, each entry r / E times: no loop over
experts, and rows of different tasks in one product.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moepeft.ops.linear import add_linear, per_row


def add_experts(y: Tensor, x: Tensor, A: Tensor, B: Tensor, w: Tensor, terms: Tensor | None = None) -> Tensor:
    """Fast path of `moepeft.methods.moelora.add_experts`."""
    if terms is None:
        terms = w.repeat_interleave(A.shape[0] // w.shape[1], dim=1)
    down = F.linear(x, A.to(x.dtype))
    return add_linear(y, down * per_row(terms, down), B)
