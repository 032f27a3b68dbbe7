"""Fast path of MoRE's selectors: those of all sites together.

The logits of sites of one width are one product. All that follows is one operation for all sites.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moepeft.ops.together import Together, alike

Selector = tuple[Tensor, Tensor, Tensor]
"""`moepeft.methods.more.Selector`: task table, gate, bias."""


def select_terms(
    selectors: Sequence[Selector], ladder: Tensor, unit: float, tasks: Tensor, kind: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Fast path of `moepeft.methods.more.select_terms`."""
    together, logits, order = Together(len(selectors)), [], list[int]()
    tables: dict[int, Tensor] = {}
    for group in alike([table.shape[1] for table, _, _ in selectors]):
        table, gate, bias = (
            together.stack(column, group) for column in zip(*(selectors[n] for n in group), strict=True)
        )
        logits.append(torch.baddbmm(bias.unsqueeze(1), table, gate.mT))
        tables.update(zip(group, together.apart(table, group), strict=True))
        order += group
    p = torch.cat(logits).softmax(dim=-1)
    p_m, m = p.max(dim=-1, keepdim=True)
    s = p_m - p_m.detach() + 1
    rungs = (ladder * unit).to(p.dtype).index_select(0, m.flatten()).view(*m.shape[:2], -1)
    of_rows = together.apart((s * rungs).index_select(1, tasks).to(kind), order)
    weights = dict(zip(order, of_rows, strict=True))
    return [(weights[number], tables[number]) for number in range(len(selectors))]
