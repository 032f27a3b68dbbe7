"""Fast path of `moepeft.methods._contrastive.contrastive_task_loss`.

Sites of one shape are computed together. One by one, dozens of kernels on tensors this small would cost more than what
they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Term = tuple[Tensor, Tensor, Tensor]


def contrastive_task_loss(terms: Sequence[Term], temperature: float) -> Tensor:
    """The loss, one batched product per shape of sites."""
    alike: dict[Any, list[Term]] = {}
    for term in terms:
        alike.setdefault(tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in term[:2]), []).append(term)
    sums = []
    for group in alike.values():
        summaries, tables = (torch.stack(tensors) for tensors in list(zip(*group, strict=True))[:2])
        wide = torch.promote_types(tables.dtype, torch.float32)
        with torch.autocast(device_type=tables.device.type, enabled=False):
            # This way round the tables' gradients come in the order of the tables.
            cosines = (F.normalize(tables.to(wide), dim=-1) @ F.normalize(summaries.to(wide), dim=-1).mT).mT
            tasks = group[0][2].repeat(len(group))
            losses = F.cross_entropy((cosines / temperature).flatten(0, 1), tasks, reduction="sum")
        sums.append(losses / len(group[0][2]))
    return torch.stack(sums).sum() / len(terms)
