"""Fast path of `moepeft.methods._contrastive.contrastive_task_loss`.

Sites of one width are multiplied together, and what comes after the products is computed for all sites at once. One by
one, dozens of kernels on tensors this small would cost more than what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moepeft.ops.precision import without_autocast
from moepeft.ops.together import alike

Term = tuple[Tensor, Tensor, Tensor]
LEAST = 1e-24
"""Square of the least norm that `F.normalize` divides by."""


def contrastive_task_loss(terms: Sequence[Term], temperature: float) -> Tensor:
    """The loss: sites whose batches have as many rows and tasks are computed together."""
    groups = alike([(len(summary), len(table)) for summary, table, _ in terms])
    sums = [_sum_over_sites([terms[number] for number in group], temperature) for group in groups]
    return (sums[0] if len(sums) == 1 else torch.stack(sums).sum()) / len(terms)


def _sum_over_sites(terms: Sequence[Term], temperature: float) -> Tensor:
    """The sum over sites of a loss that is a mean over rows."""
    summary, table, tasks = terms[0]
    sizes = [len(summary), len(table)]
    wide = torch.promote_types(table.dtype, torch.float32)
    products, squares = [], []
    with without_autocast(table):
        for group in alike([term[1].shape[1] for term in terms]):
            both = torch.cat([tensor for number in group for tensor in terms[number][:2]]).to(wide)
            both = both.view(len(group), sum(sizes), -1)
            rows, embeddings = torch.split(both, sizes, dim=1)
            products.append(rows @ embeddings.mT)
            squares.append(both.square().sum(dim=-1))
        inverse = torch.cat(squares).clamp(min=LEAST).rsqrt()
        of_rows, of_embeddings = torch.split(inverse, sizes, dim=1)
        cosines = torch.cat(products) * of_rows.unsqueeze(2) * of_embeddings.unsqueeze(1)
        every = tasks.expand(len(terms), -1).reshape(-1)  # a cross entropy does not care which site a row is of
        return F.cross_entropy(cosines.flatten(0, 1) / temperature, every, reduction="sum") / sizes[0]
