"""What routes by task, for all sites together: the logits of sites of one width are one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moepeft.ops.linear import at_least_twice
from moepeft.ops.together import Together, alike

Selector = tuple[Tensor, Tensor, Tensor | None]
"""`moepeft.methods._task_gates.Selector`: task table, gate, bias."""


def route_rows(
    selectors: Sequence[Selector], choose: Callable[[Tensor], Tensor], tasks: Tensor, kind: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Fast path of `moepeft.methods._task_gates.route_rows`."""
    together = Together(len(selectors))
    groups = alike([table.shape[1] for table, _, _ in selectors])
    has_bias = selectors[0][2] is not None
    parts = [
        {n: tensor for n in group if (tensor := selectors[n][part]) is not None}
        for group in groups
        for part in range(3)
    ]
    stacked = iter(together.stack(*(own for own in parts if own)))
    tables, logits = [], []
    for group in groups:
        table, gate = next(stacked), next(stacked)
        # One site's stack is a view of the parameter.
        tables.append((group, table.clone() if len(selectors) == 1 else table))
        several = at_least_twice(table)
        bias = next(stacked).unsqueeze(1) if has_bias else None
        logits.append(several @ gate.mT if bias is None else torch.baddbmm(bias, several, gate.mT))
    order = [number for group in groups for number in group]
    chosen = choose(torch.cat(logits)).index_select(1, tasks).to(kind)
    of_rows, *of_tables = together.apart((order, chosen), *tables)
    copies = {number: table for own in of_tables for number, table in own.items()}
    return [(of_rows[number], copies[number]) for number in range(len(selectors))]
