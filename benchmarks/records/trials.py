"""The trials of a tuned run, read from their records: which rate is best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.records.schema import Cell, RunRecord
from benchmarks.records.store import Store

FOLDER = "tuning"


def trial_store(root: Path) -> Store:
    """Where the trials of a results folder are."""
    return Store(root / FOLDER)


def belongs(trial: Cell, reported: Cell) -> bool:
    """Whether a trial is one of those that the rates of a reported cell's table were chosen by.

    Raises:
        ValueError: the rate of the reported cell was not tuned.
    """
    how, own = reported.tuned, trial.protocol
    if how is None:
        raise ValueError(f"the rate of {reported.method} was not tuned, so that it has no trials")
    expected = reported.protocol.with_overrides(
        learning_rate=own.learning_rate, evaluate_on="fold", steps=how.steps, head_learning_rate=own.head_learning_rate
    )
    return (
        trial.trial
        and (trial.seed, trial.data, trial.numerics_version) == (how.seed, reported.data, reported.numerics_version)
        and own == expected
        and own.learning_rate in how.rates
        # The heads' own rate, or the tried one where nothing but heads trains.
        and own.head_learning_rate in (how.head_learning_rate, own.learning_rate)
    )


@dataclass(frozen=True, slots=True)
class Trials:
    """The trials of one method.

    Attributes:
        method: its name on the command line.
        scores: by rate the mean over tasks of the primary metric, rising; None where a trial failed.
        statuses: by rate how the trial ended; ``missing`` where there is none.
        rows: rows that a trial was scored on, all tasks together.
    """

    method: str
    scores: Mapping[float, float | None]
    statuses: Mapping[float, str]
    rows: int = 0

    @property
    def best(self) -> float:
        """The rate with the highest score, the lower one of equals.

        Where every trial failed it is the lowest rate: the reported runs then say in their own row what goes wrong.
        """
        return max(sorted(self.scores), key=lambda rate: (_score(self.scores[rate]), -rate))

    @property
    def at_edge(self) -> str | None:
        """Where the best rate is an end of the grid: a better one may lie beyond."""
        rates = sorted(self.scores)
        if len(rates) < 2 or all(score is None for score in self.scores.values()):
            return None
        return {rates[0]: "lowest", rates[-1]: "highest"}.get(self.best)

    @property
    def complete(self) -> bool:
        """Whether every rate was tried to an end, good or bad."""
        return not any(status in ("missing", "interrupted") for status in self.statuses.values())


def read_trials(method: str, records: Mapping[float, RunRecord | None]) -> Trials:
    """Scores and statuses from the records by rate."""
    scores = {
        rate: mean_primary(record) if record is not None and record.status == "ok" else None
        for rate, record in sorted(records.items())
    }
    statuses = {rate: "missing" if record is None else record.status for rate, record in sorted(records.items())}
    rows = max((sum(one.rows for one in record.scores.values()) for record in records.values() if record), default=0)
    return Trials(method, scores, statuses, rows)


def mean_primary(record: RunRecord) -> float | None:
    """Mean over tasks of the first metric, counted as everywhere; None of a record without scores."""
    values = [score.counted(score.primary) for score in record.scores.values()]
    return sum(values) / len(values) if values else None


def _score(score: float | None) -> float:
    return -math.inf if score is None else score
