"""The trials of a tuned run, read from their records: which rate is best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

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
    expected = reported.protocol.for_trial(own.steps).with_overrides(
        learning_rate=own.learning_rate, head_learning_rate=own.head_learning_rate
    )
    return (
        trial.trial
        and trial.seed in how.seeds
        and (trial.data, trial.numerics_version) == (reported.data, reported.numerics_version)
        and own == expected
        and own.steps in (how.first_steps, how.steps)
        and (own.learning_rate in how.rates or how.extensions > 0)
        # The heads' own rate, or the tried one where nothing but heads trains.
        and own.head_learning_rate in (how.head_learning_rate, own.learning_rate)
    )


@dataclass(frozen=True, slots=True)
class Trials:
    """The trials of one method.

    Attributes:
        method: its name on the command line.
        scores: by rate the mean of the endpoint over tasks and seeds, rising; None where a trial failed. Of two rungs
            the last one's.
        statuses: by rate how the trial ended; ``missing`` where there is none.
        rows: rows that a trial was scored on, all tasks together.
        first: the same scores of the first rung; empty where there is one rung.
        counted: the scores that the choice was made by: a trial that failed, or ended lower, counts as
            `benchmarks.protocols.halving.WORST` in the mean over seeds; unset, `scores` without those that failed.
    """

    method: str
    scores: Mapping[float, float | None]
    statuses: Mapping[float, str]
    rows: int = 0
    first: Mapping[float, float | None] = field(default_factory=dict)
    counted: Mapping[float, float] = field(default_factory=dict)

    @property
    def best(self) -> float:
        """The rate that the choice fell on: the highest score as it is counted, the lower one of equals.

        Where every trial failed it is the lowest rate: the reported runs then say in their own row what goes wrong.
        """
        counted = self.counted or {rate: score for rate, score in self.scores.items() if score is not None}
        return max(sorted(self.scores), key=lambda rate: (counted.get(rate, -math.inf), -rate))

    @property
    def at_edge(self) -> str | None:
        """Where the best rate is an end of what was tried to the end: a better one may lie beyond."""
        rates = sorted(rate for rate in self.scores if self.statuses[rate] != "missing")
        if len(rates) < 2 or all(score is None for score in self.scores.values()):
            return None
        return {rates[0]: "lowest", rates[-1]: "highest"}.get(self.best)


def endpoint_score(record: RunRecord) -> float | None:
    """Mean over tasks of what the protocol declares as its endpoint, counted as everywhere; None without scores."""
    protocol = record.cell.protocol
    scores = [score for name, score in record.scores.items() if name in (protocol.endpoint_tasks or record.scores)]
    if protocol.endpoint == "skill":
        values = [score.likelihood.skill for score in scores if score.likelihood is not None]
        return fmean(values) if len(values) == len(scores) > 0 else None
    return fmean(score.counted(score.primary) for score in scores) if scores else None
