"""The table of scores: per task and mean, with intervals over seeds, failures in their places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from benchmarks.records.schema import RunRecord
from benchmarks.reporting.comparable import Group, MethodRuns, baseline_rank
from benchmarks.reporting.render import Table
from benchmarks.statistics.intervals import mean_interval, standard_error

NOT_AVAILABLE = "n/a"
MEAN = "mean"

# Spread like correlations; every other metric is a share of rows.
CORRELATIONS = ("matthews", "pearson", "spearman")


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric of one task over the seeds of a method.

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
    """All figures of one row of the table.

    Attributes:
        tasks: by task the figures, the primary one first. A task without any score is missing.
        mean: of the primary figures, over the tasks where that is defined in every run.
        averaged: names of those tasks.
    """

    runs: MethodRuns
    tasks: dict[str, tuple[Figure, ...]]
    mean: Figure | None
    averaged: tuple[str, ...]


def method_scores(runs: MethodRuns, tasks: Sequence[str]) -> MethodScores:
    """Average the finished runs of a method."""
    finished = runs.finished
    figures = {
        task: _task_figures(finished, task)
        for task in tasks
        if finished and all(task in record.scores for record in finished)
    }
    averaged = tuple(task for task, (primary, *_) in figures.items() if primary.mean is not None)
    mean = None
    if averaged:
        per_run = [float(np.mean([_primary(record, task) for task in averaged])) for record in finished]
        mean = _figure(MEAN, per_run, sum(figures[task][0].rows for task in averaged))
    return MethodScores(runs, figures, mean, averaged)


def ranked_scores(group: Group) -> list[MethodScores]:
    """The rows in the order they are shown: baselines, then by mean; those that lack a task last."""
    rows = [method_scores(runs, group.tasks) for runs in group.rows]

    def position(row: MethodScores) -> tuple[int, int, float, str]:
        missing = len(group.tasks) - len(row.averaged)
        mean = -math.inf if row.mean is None or row.mean.mean is None else row.mean.mean
        rank = baseline_rank(row.runs.method)
        return rank, (missing if rank == baseline_rank("") else 0), -mean, row.runs.label

    return sorted(rows, key=position)


def scores_table(group: Group) -> Table:
    """One column per task, the primary metric first, and the mean over tasks of the primary metric."""
    rows = ranked_scores(group)
    lines, facts = [], []
    for row in rows:
        cells = {"method": row.runs.label, "seeds": row.runs.seeds}
        cells |= {_heading(rows, task): _task_cell(row, task) for task in group.tasks}
        lines.append(cells | {MEAN: _mean_cell(row, len(group.tasks))})
        facts += _facts(row, group.tasks)
    return Table(
        name="scores",
        title=f"Scores ({group.label})",
        text=pd.DataFrame(lines),
        data=pd.DataFrame(facts, columns=["method", "task", "metric", "mean", "half_width", "seeds", "rows", "status"]),
        notes=(_legend(rows), *_noise_notes(rows), *_score_notes(group)),
    )


def _task_figures(finished: Sequence[RunRecord], task: str) -> tuple[Figure, ...]:
    first = finished[0].scores[task]
    names = [first.primary, *(name for name in first.metrics if name != first.primary)]
    return tuple(
        _figure(name, [record.scores[task].metrics.get(name) for record in finished], first.rows) for name in names
    )


def _figure(metric: str, values: Sequence[float | None], rows: int) -> Figure:
    known = [value for value in values if value is not None and math.isfinite(value)]
    # Averaging the runs in which a metric is defined would hide those that went wrong.
    if len(known) < len(values):
        return Figure(metric, None, None, rows)
    mean, half = mean_interval(known)
    return Figure(metric, mean, None if math.isnan(half) else half, rows)


def _primary(record: RunRecord, task: str) -> float:
    score = record.scores[task]
    value = score.metrics[score.primary]
    return math.nan if value is None else value


def _heading(rows: Sequence[MethodScores], task: str) -> str:
    figures = next((row.tasks[task] for row in rows if task in row.tasks), ())
    names = " / ".join(figure.metric for figure in figures)
    return f"{task} ({names})" if names else task


def _task_cell(row: MethodScores, task: str) -> str:
    if task in row.tasks:
        return " / ".join(figure.text for figure in row.tasks[task])
    return NOT_AVAILABLE if row.runs.finished else row.runs.failure


def _mean_cell(row: MethodScores, tasks: int) -> str:
    if row.mean is None:
        return NOT_AVAILABLE if row.runs.finished else row.runs.failure
    return row.mean.text if len(row.averaged) == tasks else f"{row.mean.text} ({len(row.averaged)} of {tasks} tasks)"


def _facts(row: MethodScores, tasks: Sequence[str]) -> list[dict[str, object]]:
    finished = len(row.runs.finished)
    figures = [(task, figure) for task in tasks for figure in row.tasks.get(task, ())]
    if row.mean is not None:
        figures.append((f"{MEAN} of {len(row.averaged)}", row.mean))
    common = {"method": row.runs.label, "seeds": finished, "status": row.runs.failure or "ok"}
    if not figures:
        return [common]
    return [
        common
        | {
            "task": task,
            "metric": figure.metric,
            "mean": figure.mean,
            "half_width": figure.half_width,
            "rows": figure.rows,
        }
        for task, figure in figures
    ]


def _legend(rows: Sequence[MethodScores]) -> str:
    text = "Scores times 100; the mean is over the first metric of every task"
    if any(len(row.runs.finished) > 1 for row in rows):
        text += "; ± is half of the 95 % interval of the mean over seeds (Student t)"
    return f"{text}."


def _noise_notes(rows: Sequence[MethodScores]) -> list[str]:
    """With one seed there is no interval; what the number of test rows alone says stands in its place."""
    single = [
        row for row in rows if len(row.runs.finished) == 1 and baseline_rank(row.runs.method) > 0 and row.averaged
    ]
    if not single:
        return []
    error = float(np.mean([_mean_error(row) for row in single]))
    note = (
        f"One seed, no interval: from the number of test rows alone the standard error of a mean is {100 * error:.1f}, "
        f"so differences between means below {100 * 1.96 * math.sqrt(2) * error:.1f} are noise; the noise of training "
        "comes on top."
    )
    return [note]


def _mean_error(row: MethodScores) -> float:
    figures = [row.tasks[task][0] for task in row.averaged]
    errors = [
        standard_error(figure.mean, figure.rows, is_correlation=figure.metric in CORRELATIONS)
        for figure in figures
        if figure.mean is not None
    ]
    return float(np.linalg.norm(errors)) / len(errors)


def _score_notes(group: Group) -> list[str]:
    """What the metrics had to say, once per method, with the tasks it was said of."""
    tasks: dict[tuple[str, str], dict[str, None]] = {}
    for row in group.rows:
        for record in row.finished:
            for task, score in record.scores.items():
                if score.note:
                    tasks.setdefault((row.label, score.note.rstrip(".")), {})[task] = None
    return [f"{label}: {note} ({', '.join(found)})." for (label, note), found in tasks.items()]
