"""Which cells are this command's to run: its shard, and of that what is not done."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.plan.cells import PlannedCell
from benchmarks.records.schema import RunRecord
from benchmarks.records.store import Store

Rerun = Literal["missing", "failed", "all"]


@dataclass(frozen=True, slots=True)
class Part:
    """The cells of one store, and which of them are this command's to run.

    Attributes:
        store: where their records are.
        cells: all of them.
        shards: the shard of each.
        mine: those of this command's shard.
        due: those of `mine` that it will run.
    """

    store: Store
    cells: tuple[PlannedCell, ...]
    shards: tuple[int, ...]
    mine: tuple[PlannedCell, ...]
    due: tuple[PlannedCell, ...]

    def describe(self, what: str, shard: str | None) -> Iterator[str]:
        """A line per cell, and how many are to run."""
        due = {planned.cell.id for planned in self.due}
        for planned, number in zip(self.cells, self.shards, strict=True):
            record = self.store.find(planned.cell)
            notes: list[str] = ["missing" if record is None else record.status]
            notes += [f"shard {number}"] if shard else []
            notes += ["will run"] if planned.cell.id in due else []
            yield f"{planned.cell.id}  {planned.name}  seed {planned.cell.seed}  {', '.join(notes)}"
        of = f" (shard {shard})" if shard else ""
        yield f"{len(self.due)} of {len(self.cells)} {what} to run{of}, records in {self.store.records_folder}"

    def failed(self) -> list[RunRecord]:
        """The records of this command's cells that did not end well."""
        records = (self.store.find(planned.cell) for planned in self.mine)
        return [record for record in records if record is not None and record.status != "ok"]


def deal(
    cells: Sequence[PlannedCell],
    store: Store,
    *,
    shard: tuple[int, int],
    rerun: Rerun,
    by_method: Collection[str] | None = None,
) -> Part:
    """Deal the cells to the shards: all of them, not those that are due, as shards may start at different times.

    Args:
        cells: of one store.
        store: where their records are.
        shard: the number of this command's shard, and how many there are.
        rerun: which of the cells are due that have a record.
        by_method: names of all methods where whole methods are dealt. A shard that tunes rates then needs no other
            shard's trials to choose a rate.
    """
    number, shards = shard
    order = None if by_method is None else list(by_method)
    dealt = tuple(
        (at if order is None else order.index(planned.cell.method)) % shards for at, planned in enumerate(cells)
    )
    mine = tuple(planned for planned, owner in zip(cells, dealt, strict=True) if owner == number)
    due = tuple(planned for planned in mine if _is_due(store.find(planned.cell), rerun))
    return Part(store, tuple(cells), dealt, mine, due)


def _is_due(record: RunRecord | None, rerun: Rerun) -> bool:
    if record is None or rerun == "all" or record.status == "interrupted":
        return True
    return rerun == "failed" and record.status != "ok"
