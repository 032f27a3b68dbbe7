"""Which cells may stand in one table, and which must have consumed the same."""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from benchmarks.records.schema import Cell, RunRecord


class Baseline(StrEnum):
    """Methods that adapt nothing, in the order in which they open every table."""

    MAJORITY = "majority"
    HEAD = "head"
    BARE = "bare"


_RATES = frozenset({"learning_rate", "head_learning_rate"})
# What a cell has of its own within a table.
_OWN = frozenset({"protocol", "method", "config", "seed"})


def comparable(cell: Cell) -> dict[str, Any]:
    """Everything that the cells of one table share, as JSON holds it.

    The fields of the protocol stand beside those of the cell. Where rates were tuned every method has its own, so that
    the rates are left out.
    """
    return _shared(cell, without=_RATES if cell.tuned is not None else frozenset())


def own_rates(cell: Cell) -> dict[str, Any]:
    """The learning rates of a cell where they are its own; none where the whole table shares them."""
    return cell.protocol.model_dump(mode="json", include=set(_RATES)) if cell.tuned is not None else {}


def left_behind(records: Iterable[RunRecord], cells: Iterable[Cell]) -> list[RunRecord]:
    """Reported runs at rates that their tuning no longer chooses, since trials were run again.

    Args:
        records: of a results folder.
        cells: those of the study as its rates are chosen now.
    """

    def run_of(cell: Cell) -> str:
        return json.dumps([comparable(cell), cell.method, cell.config, cell.seed], sort_keys=True, default=str)

    now = [cell for cell in cells if cell.tuned is not None]
    ids, runs = {cell.id for cell in now}, {run_of(cell) for cell in now}
    tuned = [record for record in records if record.cell.tuned is not None]
    return [record for record in tuned if record.cell.id not in ids and run_of(record.cell) in runs]


def budget_differences(records: Iterable[RunRecord]) -> list[str]:
    """One line for every pair of finished cells that should have consumed the same, at any rate, and did not."""
    first: dict[str, RunRecord] = {}
    problems = []
    for record in records:
        if record.status != "ok" or record.budget is None:
            continue
        key = json.dumps([_shared(record.cell, without=_RATES), record.cell.seed], sort_keys=True)
        other = first.setdefault(key, record)
        assert other.budget is not None
        mine, theirs = record.budget.model_dump(), other.budget.model_dump()
        differing = [name for name in mine if mine[name] != theirs[name]]
        if differing:
            details = ", ".join(f"{name} {mine[name]} and {theirs[name]}" for name in differing)
            problems.append(
                f"{record.cell.method} ({record.cell.id}) and {other.cell.method} ({other.cell.id}), "
                f"seed {record.cell.seed}, did not consume the same: {details}"
            )
    return problems


def _shared(cell: Cell, *, without: frozenset[str]) -> dict[str, Any]:
    return cell.protocol.model_dump(mode="json", exclude=set(without)) | cell.model_dump(mode="json", exclude=set(_OWN))
