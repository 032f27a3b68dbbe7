"""A results folder as one long pandas frame: ``Results.load("results/glue").frame()``.

One row holds one number: a metric of a run, of one of its tasks, or of one of its training steps. The facts of the run
stand in every row, so that a table is a filter and a pivot. Every table of the report is a view of this frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel

from benchmarks.records.analysis import read_analysis
from benchmarks.records.comparable import Group, find_row, group_records
from benchmarks.records.schema import RunRecord
from benchmarks.records.store import RecordError, Store
from benchmarks.records.trials import belongs, trial_store

RUN_COLUMNS: Mapping[str, tuple[str, str]] = {
    "cell": ("str", "id of the run: the hash of its protocol, rows, method, configuration and seed"),
    "protocol": ("str", "name of the protocol, with the differing fields where several protocols have that name"),
    "protocol_id": ("str", "hash of what all runs of one table share; a trial has that of the runs it is for"),
    "label": ("str", "the row of a table: the method, with the differing fields where it stands there several times"),
    "method": ("str", "the method without its preset"),
    "preset": ("str", "the preset; empty for the default one"),
    "seed": ("int64", "of the run"),
    "trial": ("bool", "whether the run only served to choose a learning rate"),
    "status": ("str", "ok, or how the run failed"),
    "backbone": ("str", "the frozen model"),
    "track": ("str", "as-published, or matched for sizes that were chosen for equal parameters"),
    "steps": ("int64", "optimiser steps"),
    "batch_size": ("int64", "rows per step"),
    "learning_rate": ("float64", "the peak rate of the adapters"),
    "device": ("str", "the machine, as it names itself"),
}
VALUE_COLUMNS: Mapping[str, tuple[str, str]] = {
    "task": ("str", "the task; missing where the number is one of the whole run"),
    "step": ("Int64", "the training step; missing where the number is none of a step"),
    "metric": ("str", "what was measured; missing in the one row of a run that measured nothing"),
    "primary": ("bool", "whether the metric counts for the mean over tasks"),
    "value": ("float64", "the number; a metric that is undefined, such as the correlation of a constant, counts as 0"),
    "rows": ("Int64", "test rows behind a score"),
    "note": ("str", "what the metric had to say, or how the number was measured"),
}
COLUMNS = {**RUN_COLUMNS, **VALUE_COLUMNS}
"""Type and meaning of every column of the frame."""


class NoRecordsError(RecordError):
    """A folder holds no records."""


Measured = tuple[str | None, int | None, str | None, bool, float | None, int | None, str | None]


@dataclass(frozen=True)
class Results:
    """The records of one results folder.

    Attributes:
        records: the reported runs.
        trials: the runs that learning rates were chosen by.
        folder: where the outcomes of single test rows are; None for records that were never written.
    """

    records: tuple[RunRecord, ...]
    trials: tuple[RunRecord, ...] = ()
    folder: Path | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Read and validate all records of a results folder.

        Raises:
            NoRecordsError: the folder holds no records.
            RecordError: a file is damaged or of another version of the schema.
        """
        root = Path(folder)
        records = tuple(Store(root).all())
        if not records:
            raise NoRecordsError(
                f"there are no records under {Store(root).records_folder}; run `python -m benchmarks.run` first"
            )
        return cls(records, tuple(trial_store(root).all()), root)

    @property
    def looks(self) -> int:
        """How often these runs are looked at, as the folder's `analysis.toml` declares; one unless it says otherwise.

        Raises:
            RecordError: the file says something else, or no whole number.
        """
        return 1 if self.folder is None else read_analysis(self.folder).looks

    def groups(self) -> list[Group]:
        """The records by what may stand in one table, with their labels."""
        return group_records(self.records)

    def frame(self) -> pd.DataFrame:
        """One row per number, with the columns `COLUMNS`; runs, tasks and metrics in the order of the tables."""
        groups = self.groups()
        rows = [
            row
            for group in groups
            for runs in group.rows
            for record in runs.records
            for row in _rows_of(record, group.label, group.key, runs.label)
        ]
        for trial in self.trials:
            for place in _places_of_trial(trial, groups):
                rows += _rows_of(trial, *place)
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        return frame.astype({column: dtype for column, (dtype, _) in COLUMNS.items()})

    def outcomes(self, protocol_id: str | None = None) -> pd.DataFrame:
        """One row per finished run and test row: what is true there, what the run predicted, and how likely that was.

        The likelihoods, of the run and of the prior, are missing where the run gave none.

        Args:
            protocol_id: of one table; None for all reported runs.
        """
        parts = [
            self._read_outcomes(record, group.key, runs.label)
            for group in self.groups()
            if protocol_id in (None, group.key)
            for runs in group.rows
            for record in runs.finished
            if record.outcomes is not None
        ]
        columns = ["protocol_id", "cell", "label", "seed", "task", "index", "truth", "prediction"]
        columns += ["log_likelihood", "prior_log_likelihood"]
        return pd.concat(parts, ignore_index=True).reindex(columns=columns) if parts else pd.DataFrame(columns=columns)

    def _read_outcomes(self, record: RunRecord, key: str, label: str) -> pd.DataFrame:
        assert self.folder is not None
        rows = Store(self.folder).outcomes(record).rename(columns={"label": "truth"})
        return rows.assign(protocol_id=key, cell=record.cell.id, label=label, seed=record.cell.seed)


def _places_of_trial(trial: RunRecord, groups: list[Group]) -> list[tuple[str, str, str]]:
    """Protocol, its id and label of the reported runs that a trial is for, in every table; its own where none is."""
    places = [
        (group.label, group.key, runs.label)
        for group in groups
        if group.tuned is not None and (runs := find_row(group, trial.cell)) is not None
        if belongs(trial.cell, runs.records[0].cell)
    ]
    (alone,) = group_records([trial])
    return places or [(alone.label, alone.key, alone.rows[0].label)]


def _rows_of(record: RunRecord, protocol: str, key: str, label: str) -> list[tuple[Any, ...]]:
    facts = _run_facts(record, protocol, key, label)  # once: they hold a hash of the whole cell
    return [(*facts, *measured) for measured in _measure(record)]


def _run_facts(record: RunRecord, protocol: str, key: str, label: str) -> tuple[Any, ...]:
    cell = record.cell
    method, _, preset = cell.method.partition("@")
    return (
        cell.id, protocol, key, label, method, preset, cell.seed, cell.trial, record.status, cell.protocol.backbone,
        cell.protocol.track, cell.protocol.steps, cell.protocol.batch_size, cell.protocol.learning_rate,
        record.provenance.device,
    )  # fmt: skip


def _measure(record: RunRecord) -> Iterator[Measured]:
    """Every number of a record; a single empty row where there is none."""
    numbers = [*_scores(record), *_costs(record), *_curve(record), *_swaps(record)]
    yield from numbers or [(None, None, None, False, None, None, record.reason)]


def _scores(record: RunRecord) -> Iterator[Measured]:
    for task, score in record.scores.items():
        for metric in [score.primary, *(name for name in score.metrics if name != score.primary)]:
            yield task, None, metric, metric == score.primary, score.counted(metric), score.rows, score.note
        if score.likelihood is not None:
            found = score.likelihood
            yield task, None, "skill", False, found.skill, None, None
            yield task, None, "nll", False, found.nll, None, None
            yield task, None, "calibration_error", False, found.calibration_error, None, None
    for task, rows in (record.budget.rows_per_task if record.budget else {}).items():
        yield task, None, "budget.rows", False, rows, None, None


def _costs(record: RunRecord) -> Iterator[Measured]:
    for name in ("parameters", "budget", "timing", "memory"):
        part: BaseModel | None = getattr(record, name)
        for metric, value in _flatten(part, name) if part is not None else ():
            note = record.memory.kind if name == "memory" and record.memory else None
            yield None, None, metric, False, value, None, note


def _curve(record: RunRecord) -> Iterator[Measured]:
    for point in record.curve:
        for name, loss in point.losses.items():
            yield None, point.step, f"loss.{name}", False, loss, None, None
        yield None, point.step, "learning_rate", False, point.learning_rate, None, None
        yield None, point.step, "gradient_norm", False, point.gradient_norm, None, None
    for check in record.checkpoints:
        yield None, check.step, "checkpoint.seconds", False, check.seconds, None, None
        for task in check.metrics:
            yield task, check.step, "checkpoint.metric", False, check.metrics[task], None, None
            yield task, check.step, "checkpoint.skill", False, check.skills.get(task), None, None


def _swaps(record: RunRecord) -> Iterator[Measured]:
    if record.swapped is None:
        return
    for task, row in zip(record.swapped.tasks, record.swapped.skills, strict=True):
        for told, skill in zip(record.swapped.tasks, row, strict=True):
            yield task, None, f"swapped.{told}", False, skill, None, None
    yield None, None, "swapped.lost", False, record.swapped.lost, None, None


def _flatten(part: BaseModel, prefix: str) -> Iterator[tuple[str, float]]:
    """The numbers of a part of a record by dotted name; what was not measured is left out."""
    for field, value in part:
        if isinstance(value, BaseModel):
            yield from _flatten(value, f"{prefix}.{field}")
        elif isinstance(value, int | float):
            yield f"{prefix}.{field}", value
