"""What methods are compared by, as a protocol declares it before a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from benchmarks.protocols.protocol import Protocol
from benchmarks.records.frame import Results
from benchmarks.reporting.views import select_scores


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What methods are compared by: a mean over tasks, declared by the protocol.

    Attributes:
        metric: ``skill``, or ``metric`` for the first one of every task.
        tasks: that the mean is over; empty: all.
        looks: how often the runs of the folder are looked at.
    """

    metric: Literal["metric", "skill"]
    tasks: tuple[str, ...] = ()
    looks: int = 1

    @classmethod
    def of(cls, protocol: Protocol, results: Results) -> Endpoint:
        """The declared one."""
        return cls(protocol.endpoint, protocol.endpoint_tasks, results.looks)

    def select(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of a long frame that the mean is over, one per run and task."""
        scores = select_scores(frame)
        rows = frame[frame["metric"] == "skill"] if self.metric == "skill" else scores[scores["primary"]]
        return rows[rows["task"].isin(self.tasks)] if self.tasks else rows

    @property
    def words(self) -> str:
        """For captions."""
        what = "skill 1 - NLL / NLL(prior)" if self.metric == "skill" else "first metric"
        return f"{what} over {', '.join(self.tasks)}" if self.tasks else f"{what} over all tasks"


FIRST_METRIC = Endpoint("metric")
