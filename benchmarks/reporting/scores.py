"""The table of scores: per task and mean, with intervals over seeds, failures in their places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd

from benchmarks.records.comparable import baseline_rank
from benchmarks.reporting.render import Table
from benchmarks.reporting.views import (
    NOT_AVAILABLE,
    count_runs,
    find_tasks,
    is_baseline,
    name_protocol,
    select_finished,
    select_reported,
    select_scores,
)
from benchmarks.statistics.intervals import mean_interval, standard_error

MEAN = "mean"

# Spread like correlations; every other metric is a share of rows.
CORRELATIONS = ("matthews", "pearson", "spearman")


@dataclass(frozen=True, slots=True)
class Average:
    """One metric over the seeds of a method.

    Attributes:
        mean: None when it is undefined in any of the runs.
        half_width: of the 95 % interval over seeds; None for a single seed.
        rows: test rows behind each run's score.
    """

    metric: str
    mean: float | None
    half_width: float | None
    rows: int

    @property
    def text(self) -> str:
        """In points, one decimal."""
        if self.mean is None:
            return NOT_AVAILABLE
        spread = "" if self.half_width is None else f" ± {100 * self.half_width:.1f}"
        return f"{100 * self.mean:z.1f}{spread}"


@dataclass(frozen=True, slots=True)
class MethodScores:
    """One row of the table.

    Attributes:
        label: of the row.
        method: without its preset.
        finished: number of runs.
        tasks: by task the averages, that of the primary metric first. A task that a run has no score on is missing.
        mean: of the primary metrics, over the tasks where they are defined in every run.
        averaged: names of those tasks.
    """

    label: str
    method: str
    finished: int
    tasks: Mapping[str, tuple[Average, ...]]
    mean: Average | None
    averaged: tuple[str, ...]


def average_scores(frame: pd.DataFrame) -> list[MethodScores]:
    """Average the finished runs of every label, in the order of the frame."""
    tasks = find_tasks(select_reported(frame))
    scores = select_scores(select_finished(frame))
    return [
        _average_label(str(label), str(run["method"]), int(run["finished"]), scores[scores["label"] == label], tasks)
        for label, run in count_runs(frame).iterrows()
    ]


def rank_rows(frame: pd.DataFrame) -> list[MethodScores]:
    """The rows in the order they are shown: baselines, then by mean; those that lack a task last."""
    tasks = find_tasks(select_reported(frame))

    def position(row: MethodScores) -> tuple[int, int, float, str]:
        mean = -math.inf if row.mean is None or row.mean.mean is None else row.mean.mean
        missing = 0 if is_baseline(row.method) else len(tasks) - len(row.averaged)
        return baseline_rank(row.method), missing, -mean, row.label

    return sorted(average_scores(frame), key=position)


def scores_table(frame: pd.DataFrame) -> Table:
    """One column per task, the primary metric first, and the mean over tasks of the primary metric."""
    rows, runs = rank_rows(frame), count_runs(frame)
    tasks = find_tasks(select_reported(frame))
    lines, facts = [], []
    for row in rows:
        failure = str(runs.loc[row.label, "failure"])
        cells = {"method": row.label, "seeds": str(runs.loc[row.label, "seeds"])}
        cells |= {_heading(rows, task): _task_cell(row, task, failure) for task in tasks}
        lines.append(cells | {MEAN: _mean_cell(row, len(tasks), failure)})
        facts += _facts(row, tasks, failure)
    return Table(
        name="scores",
        title=f"Scores ({name_protocol(frame)})",
        text=pd.DataFrame(lines),
        data=pd.DataFrame(facts, columns=["method", "task", "metric", "mean", "half_width", "seeds", "rows", "status"]),
        notes=(_legend(rows), *_noise_notes(rows), *_metric_notes(frame)),
    )


def _average_label(label: str, method: str, finished: int, scores: pd.DataFrame, tasks: list[str]) -> MethodScores:
    averages = {
        task: _average_task(rows, finished)
        for task in tasks
        if finished and (rows := scores[scores["task"] == task])["cell"].nunique() == finished
    }
    averaged = tuple(task for task, (primary, *_) in averages.items() if primary.mean is not None)
    mean = None
    if averaged:
        counted = scores[scores["primary"] & scores["task"].isin(averaged)]
        tested = sum(averages[task][0].rows for task in averaged)
        mean = _average(MEAN, counted.groupby("cell", sort=False)["value"].mean(), finished, tested)
    return MethodScores(label, method, finished, averages, mean, averaged)


def _average_task(scores: pd.DataFrame, finished: int) -> tuple[Average, ...]:
    rows = int(scores["rows"].iloc[0])
    by_metric = scores.groupby("metric", sort=False)["value"]
    return tuple(_average(str(metric), values, finished, rows) for metric, values in by_metric)


def _average(metric: str, values: pd.Series[float], finished: int, rows: int) -> Average:
    # Averaging the runs in which a metric is defined would hide those that went wrong.
    if len(values) < finished or not np.isfinite(values).all():
        return Average(metric, None, None, rows)
    mean, half = mean_interval(values)
    return Average(metric, mean, None if math.isnan(half) else half, rows)


def _heading(rows: list[MethodScores], task: str) -> str:
    averages = next((row.tasks[task] for row in rows if task in row.tasks), ())
    names = " / ".join(average.metric for average in averages)
    return f"{task} ({names})" if names else task


def _task_cell(row: MethodScores, task: str, failure: str) -> str:
    if task in row.tasks:
        return " / ".join(average.text for average in row.tasks[task])
    return NOT_AVAILABLE if row.finished else failure


def _mean_cell(row: MethodScores, tasks: int, failure: str) -> str:
    if row.mean is None:
        return NOT_AVAILABLE if row.finished else failure
    return row.mean.text if len(row.averaged) == tasks else f"{row.mean.text} ({len(row.averaged)} of {tasks} tasks)"


def _facts(row: MethodScores, tasks: list[str], failure: str) -> list[dict[str, object]]:
    averages = [(task, average) for task in tasks for average in row.tasks.get(task, ())]
    if row.mean is not None:
        averages.append((f"{MEAN} of {len(row.averaged)}", row.mean))
    common = {"method": row.label, "seeds": row.finished, "status": failure or "ok"}
    if not averages:
        return [common]
    return [
        {**common, "task": task, "metric": average.metric, "mean": average.mean, "half_width": average.half_width,
         "rows": average.rows}
        for task, average in averages
    ]  # fmt: skip


def _legend(rows: list[MethodScores]) -> str:
    text = "Scores times 100; the mean is over the first metric of every task"
    if any(row.finished > 1 for row in rows):
        text += "; ± is half of the 95 % interval of the mean over seeds (Student t)"
    return f"{text}."


def _noise_notes(rows: list[MethodScores]) -> list[str]:
    """With one seed there is no interval; what the number of test rows alone says stands in its place."""
    single = [row for row in rows if row.finished == 1 and row.method != "majority" and row.averaged]
    if not single:
        return []
    error = float(np.mean([estimate_row_error(row) for row in single]))
    note = (
        f"One seed, no interval: from the number of test rows alone the standard error of a mean is {100 * error:.1f}, "
        f"so differences between means below {100 * 1.96 * math.sqrt(2) * error:.1f} are noise; the noise of training "
        "comes on top."
    )
    return [note]


def estimate_row_error(row: MethodScores) -> float:
    """Standard error of a mean over tasks from the number of test rows alone."""
    primaries = [row.tasks[task][0] for task in row.averaged]
    errors = [
        standard_error(average.mean, average.rows, is_correlation=average.metric in CORRELATIONS)
        for average in primaries
        if average.mean is not None
    ]
    return float(np.linalg.norm(errors)) / len(errors)


def _metric_notes(frame: pd.DataFrame) -> list[str]:
    """What the metrics had to say, once for all methods that it was said of on the same tasks."""
    scores = select_scores(select_finished(frame)).dropna(subset="note")
    by_note = scores.assign(note=scores["note"].str.rstrip(".")).groupby(["label", "note"], sort=False)["task"]
    labels: dict[tuple[str, str], list[str]] = {}
    for key, tasks in by_note:
        label, note = map(str, cast("tuple[str, str]", key))
        labels.setdefault((note, ", ".join(tasks.unique())), []).append(label)
    return [f"{', '.join(of)}: {note} ({tasks})." for (note, tasks), of in labels.items()]
