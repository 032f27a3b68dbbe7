"""What a task is to the benchmark: its examples, its kind, its metric. Nothing here knows a model or a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["classification", "regression", "multiple_choice"]
Split = Literal["train", "validation"]


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled row, free of any data set's column names.

    Attributes:
        first: the sentence, the premise or the question.
        second: the other sentence of a pair, or the passage; ``None`` for single-sentence tasks.
        choices: the candidate answers of a multiple-choice row; empty otherwise.
        label: class index, index of the right choice, or the score of a regression row.
    """

    first: str
    second: str | None = None
    choices: tuple[str, ...] = ()
    label: int | float = 0


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """The part of a task that decides how it is modelled and scored.

    Attributes:
        name: short name used on the command line and in tables, e.g. ``rte``.
        kind: which head and which loss.
        labels: names of the classes in label order; empty for regression and multiple choice.
        metric: name of a metric in `benchmarks.tasks.metrics.METRICS`; its first figure is the one averaged.
        truncate: which part of a pair gives way to the length limit: the longer one, or always the passage.
        label_range: lowest and highest score of a regression task, ``None`` otherwise.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    metric: str
    truncate: Literal["longest_first", "only_second"] = "longest_first"
    label_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.kind == "regression" and (self.label_range is None or self.label_range[0] >= self.label_range[1]):
            raise ValueError(
                f"task {self.name}: regression needs a label_range such as (0.0, 5.0), got {self.label_range}"
            )

    @property
    def score_range(self) -> tuple[float, float]:
        """Lowest and highest score; raises `ValueError` where there are no scores."""
        if self.label_range is None:
            raise ValueError(f"task {self.name}: a {self.kind} task has no scores")
        return self.label_range


@dataclass(frozen=True, slots=True)
class TaskData:
    """The rows of one task and where they came from.

    Attributes:
        spec: the task.
        train: rows that may be trained on.
        validation: rows that are reported; never used for selection.
        source: one line for captions, e.g. ``nyu-mll/glue rte, 2,490 train and 277 validation rows``.
        fingerprint: SHA-256 over all rows, recorded with every result.
    """

    spec: TaskSpec
    train: Sequence[Example]
    validation: Sequence[Example]
    source: str
    fingerprint: str
