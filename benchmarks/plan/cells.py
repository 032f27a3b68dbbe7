"""What is to be run: the cells that methods make under a protocol."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from benchmarks.methods.base import Method
from benchmarks.protocols.protocol import Protocol
from benchmarks.records.schema import Cell, Tuning
from benchmarks.tasks.base import TaskData


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """A cell, and what is needed to run it.

    Attributes:
        cell: its identity.
        method: in the configuration of the cell.
    """

    cell: Cell
    method: Method

    @property
    def name(self) -> str:
        """The method and, of a trial, the rate."""
        trial = f" trial at {self.cell.protocol.learning_rate:g}" if self.cell.trial else ""
        return f"{self.cell.method}{trial}"

    @property
    def title(self) -> str:
        """For lines of progress."""
        return f"{self.name} seed {self.cell.seed}"


def expand(
    protocol: Protocol,
    methods: Collection[Method],
    data: Sequence[TaskData],
    seeds: Sequence[int],
    *,
    tuned: Tuning | None = None,
    trial: bool = False,
) -> list[PlannedCell]:
    """All cells, seed by seed. The rows' fingerprints belong to the identity: other data, other cells.

    Args:
        protocol: of all of them.
        methods: each is a row of the tables.
        data: the tasks' rows.
        seeds: each is run with every method.
        tuned: how the learning rate was found, if it was.
        trial: whether a learning rate is to be chosen by these cells.
    """
    fingerprints = {task.spec.name: task.fingerprint for task in data}
    return [
        PlannedCell(
            Cell(
                protocol=protocol,
                data=fingerprints,
                method=method.name,
                config=method.config(),
                seed=seed,
                tuned=tuned,
                trial=trial,
            ),
            method,
        )
        for seed in seeds
        for method in methods
    ]
