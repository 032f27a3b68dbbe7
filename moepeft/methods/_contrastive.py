"""The contrastive loss over tasks that EPT and MoRE share.

A site gives one term per forward: a summary of every row, and the embedding of every task. The loss pulls a row's
summary towards the embedding of the row's task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moepeft.context import SiteContext
from moepeft.fast import has_fast_path
from moepeft.methods._fast import contrastive as _fast
from moepeft.ops.linear import first_position, row_mean
from moepeft.ops.precision import without_autocast
from moepeft.ops.segments import Segments
from moepeft.protocols import LinearSite


class ContrastiveTerm(NamedTuple):
    """What a site gives to the contrastive loss of a forward.

    Attributes:
        summary: of each row.
        table: task embeddings.
        tasks: of the rows.
    """

    summary: Float[Tensor, "rows d"]
    table: Float[Tensor, "tasks d"]
    tasks: Int[Tensor, "rows"]


ContrastiveSites = Literal["all", "encoder"]
"""Which sites give a term: all of them, or those that stand in the encoder (the releases drop the decoder's)."""


def gives_term(config: HasContrastive, site: LinearSite) -> bool:
    """Whether a site gives a term to the loss of that configuration. Experts do not: they get tokens, not rows."""
    return (
        config.contrastive > 0 and site.fused is None and (config.contrastive_sites == "all" or site.stack == "encoder")
    )


class HasContrastive(Protocol):
    """The fields of a configuration whose method has this loss: the coefficient, and which sites give a term."""

    @property
    def contrastive(self) -> float: ...

    @property
    def contrastive_sites(self) -> ContrastiveSites: ...


@has_fast_path(_fast.contrastive_task_loss)
def contrastive_task_loss(terms: Sequence[ContrastiveTerm], temperature: float) -> Float[Tensor, ""]:
    """Cross entropy over tasks of the cosine between a row's summary and each task embedding, over `temperature`.

    The mean over rows, then over sites.

    Args:
        terms: of all sites of one forward, whose rows have the same tasks.
        temperature: what cosines are divided by.
    """
    losses = []
    for summary, table, tasks in terms:
        with without_autocast(table):
            wide = torch.promote_types(table.dtype, torch.float32)
            cosines = F.normalize(summary.to(wide), dim=-1) @ F.normalize(table.to(wide), dim=-1).T
            losses.append(F.cross_entropy(cosines / temperature, tasks))
    return torch.stack(losses).mean()


def summarise(x: Float[Tensor, "rows *n d"], ctx: SiteContext, anchor: str) -> Float[Tensor, "sequences d"]:
    """What stands for a row in a contrastive loss: the mean of its real tokens, or position 0.

    Where rows are packed, each of their sequences counts as a row.
    """
    segments = ctx.segments(x)
    if segments is not None:
        first = anchor == "first"
        make = (lambda: x[segments.first]) if first else (lambda: segments.means(x))
        return ctx.of_input("segment_first" if first else "segment_mean", x, make)
    if anchor == "first":
        return first_position(x)
    return ctx.of_input("row_mean", x, lambda: row_mean(x, ctx.token_shares(x)))


def record_contrastive(
    ctx: SiteContext,
    summary: Float[Tensor, "sequences d"],
    table: Float[Tensor, "tasks d"],
    tasks: Int[Tensor, "rows"],
) -> None:
    """Record a site's term of `contrastive_task_loss`: of the sequences where `tasks` are those of packed rows.

    The table is a copy of the parameter: a sharded parameter is whole only while its layer runs.
    """
    segments: Segments | None = ctx.get("segments")
    if segments is not None:
        tasks = tasks[segments.first]
    if not torch.is_grad_enabled():  # reentrant checkpointing: a view of the input would not show it
        summary = summary.detach()
    ctx.loss("contrastive", ContrastiveTerm(summary, table, tasks))
