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
    together, logits = Together(len(selectors)), []
    order: list[int] = []
    tables: dict[int, Tensor] = {}
    for group in alike([table.shape[1] for table, _, _ in selectors]):
        table = together.stack([selectors[number][0] for number in group], group)
        gate = together.stack([selectors[number][1] for number in group], group)
        several = at_least_twice(table)
        biases = [bias for bias in (selectors[number][2] for number in group) if bias is not None]
        if biases:
            logits.append(torch.baddbmm(together.stack(biases, group).unsqueeze(1), several, gate.mT))
        else:
            logits.append(several @ gate.mT)
        copies = table.clone() if len(selectors) == 1 else table  # one site's stack is a view of the parameter
        tables.update(zip(group, together.apart(copies, group), strict=True))
        order += group
    chosen = together.apart(choose(torch.cat(logits)).index_select(1, tasks).to(kind), order)
    of_sites = dict(zip(order, chosen, strict=True))
    return [(of_sites[number], tables[number]) for number in range(len(selectors))]
