"""Gates of experts that a task's embedding chooses, site by site or for all sites at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moepeft.fast import has_fast_path
from moepeft.methods._fast import selectors as _fast
from moepeft.ops.gates import top_k_gates
from moepeft.ops.linear import at_least_twice

Gates = Literal["softmax", "double_softmax", "softmax_all"]


def expert_gates(logits: Float[Tensor, "*n experts"], k: int, reading: Gates) -> Float[Tensor, "*n experts"]:
    """g: zero but for the k largest logits."""
    if reading == "softmax":
        return top_k_gates(logits, k)
    p = logits.softmax(dim=-1)
    return top_k_gates(p, k) if reading == "double_softmax" else p * (top_k_gates(logits, k) > 0)


class Selector(NamedTuple):
    """What routes a site's tasks: the task table, the gate, and its bias if it has one."""

    table: Float[Tensor, "tasks i"]
    gate: Float[Tensor, "experts i"]
    bias: Float[Tensor, "experts"] | None


@has_fast_path(_fast.route_rows, compiled=False)
def route_rows(
    selectors: Sequence[Selector], choose: Callable[[Tensor], Tensor], tasks: Int[Tensor, "rows"], kind: torch.dtype
) -> Sequence[tuple[Tensor, Tensor]]:
    """Of every site: for rows of `tasks` what `choose` makes of their logits, and a copy of the task table.

    A copy, since a sharded parameter is whole only while its layer runs, and a loss looks at the table later.

    Args:
        selectors: of the sites.
        choose: from logits (..., tasks, experts) to gates, or whatever else the method has a row of for every task.
        tasks: of the rows.
        kind: type of what is chosen.
    """
    logits = [F.linear(at_least_twice(table), gate, bias) for table, gate, bias in selectors]
    chosen = [choose(each).index_select(0, tasks).to(kind) for each in logits]
    return [(each, selector.table.clone()) for each, selector in zip(chosen, selectors, strict=True)]
