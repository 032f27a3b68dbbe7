"""The figures of a report, as SVG whose bytes depend on the records and on the version of matplotlib alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from benchmarks.reporting.comparable import BASELINES, Group, MethodRuns
from benchmarks.reporting.figures.embeddings import draw_embeddings
from benchmarks.reporting.figures.experts import draw_routing
from benchmarks.reporting.figures.style import (
    BASELINE_COLOUR,
    LINES,
    drawing,
    figure_title,
    legend_beside,
    method_styles,
    new_canvas,
    svg_bytes,
)
from benchmarks.reporting.scores import MethodScores, ranked_scores
from benchmarks.statistics.intervals import average_ranks, friedman, nemenyi_distance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MINIMUM_TASKS_FOR_RANKS = 5
LEAST_SPAN = 2.0
"""Points that the axis of scores covers at least."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


def draw_figures(group: Group, description: str = "") -> dict[str, bytes]:
    """All figures that the records of a group allow, SVG by name; `description` goes into their metadata."""
    drawings: dict[str, Callable[[Canvas, Group], bool]] = {
        "score-parameters": _draw_parameters,
        "score-step-time": _draw_step_time,
        "training-curves": _draw_curves,
        "critical-difference": _draw_critical_difference,
    }
    figures = {}
    with drawing():
        for name, draw in drawings.items():
            canvas = new_canvas()
            if draw(canvas, group):
                figures[name] = svg_bytes(canvas, description)
        for runs in group.rows:
            stem = re.sub(r"[^A-Za-z0-9._-]+", "_", runs.label).strip("_")
            for name, canvas in _routing_figures(runs):
                figures[f"{name}-{stem}"] = svg_bytes(canvas, description)
    return figures


def _routing_figures(runs: MethodRuns) -> Iterator[tuple[str, Canvas]]:
    """The figures of a method's first run that recorded its routing, by the start of their name."""
    record = next((record for record in runs.finished if record.routing is not None), None)
    if record is None or record.routing is None:
        return
    if record.routing.sites:
        yield "routing", draw_routing(runs.label, record, record.routing)
    embeddings = record.routing.embeddings
    if embeddings is not None and len(record.routing.tasks) > 1:
        yield "task-embeddings", draw_embeddings(runs.label, record, record.routing.tasks, embeddings)


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Indices of the points that no other one beats in cost without losing in score, by rising cost."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if not front or scores[index] > scores[front[-1]]:
            front.append(index)
    return front


def _draw_parameters(canvas: Canvas, group: Group) -> bool:
    def parameters(runs: MethodRuns) -> Interval | None:
        known = [record.parameters.adapter for record in runs.finished if record.parameters is not None]
        return Interval(known[0], known[0], known[0]) if known and known[0] > 0 else None

    return _draw_trade_off(canvas, group, parameters, "trainable adapter parameters (heads apart)")


def _draw_step_time(canvas: Canvas, group: Group) -> bool:
    def step_time(runs: MethodRuns) -> Interval | None:
        steps = [r.train_step for r in runs.finished if r.train_step is not None]
        if not steps:
            return None
        middle, low, high = (np.median([getattr(step, name) for step in steps]) for name in ("median", "p10", "p90"))
        return Interval(1e3 * float(middle), 1e3 * float(low), 1e3 * float(high))

    return _draw_trade_off(canvas, group, step_time, "training step, ms (median, 10th to 90th percentile)")


def _draw_trade_off(canvas: Canvas, group: Group, cost_of: Callable[[MethodRuns], Interval | None], label: str) -> bool:
    """Mean score against a cost, both with intervals, and the Pareto front."""
    rows = [row for row in ranked_scores(group) if row.averaged and len(row.averaged) == _most_tasks(group)]
    points = [
        (row, cost, _score(row))
        for row in rows
        if row.runs.method not in BASELINES and (cost := cost_of(row.runs)) is not None
    ]
    if not points:
        return False
    axes = canvas.add_subplot()
    styles = method_styles(group)
    for row, cost, score in points:
        colour, marker, _ = styles[row.runs.label]
        axes.errorbar(
            cost.value,
            score.value,
            xerr=[[cost.value - cost.low], [cost.high - cost.value]],
            yerr=[[score.value - score.low], [score.high - score.value]],
            fmt=marker,
            color=colour,
            capsize=3,
            markersize=7,
            label=row.runs.label,
        )
    _draw_baselines(axes, rows)
    front = pareto_front([cost.value for _, cost, _ in points], [score.value for *_, score in points])
    axes.step(
        [points[i][1].value for i in front], [points[i][2].value for i in front],
        where="post", color="#999999", linewidth=1, zorder=1, label="Pareto front",
    )  # fmt: skip
    _widen(axes, LEAST_SPAN)
    _scale_costs(axes, [bound for _, cost, _ in points for bound in (cost.low, cost.high)])
    axes.set(xlabel=label, ylabel=f"mean score over {_most_tasks(group)} tasks, points", title=figure_title(group))
    legend_beside(axes)
    return True


def _widen(axes: Axes, least: float) -> None:
    """A vertical axis that does not blow up differences of no account."""
    low, high = axes.get_ylim()
    if high - low < least:
        axes.set_ylim((low + high - least) / 2, (low + high + least) / 2)


def _scale_costs(axes: Axes, values: Sequence[float]) -> None:
    """A log axis with round numbers where costs span a decade, a linear one where they do not."""
    if max(values) < 10 * min(values):
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter("{x:,.10g}")
        return
    low, high = min(values) / 1.25, max(values) * 1.25
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    inside = [tick for power in powers for step in steps if low <= (tick := step * 10.0**power) <= high]
    axes.set_xticks(inside, [f"{tick:,.10g}" for tick in inside])
    axes.minorticks_off()


def _draw_baselines(axes: Axes, rows: Sequence[MethodScores]) -> None:
    for row in rows:
        if row.runs.method in BASELINES:
            style = LINES[1 + BASELINES.index(row.runs.method)]
            axes.axhline(_score(row).value, color=BASELINE_COLOUR, linestyle=style, linewidth=1.2, label=row.runs.label)


def _draw_curves(canvas: Canvas, group: Group) -> bool:
    """Task loss over steps, mean of the seeds and their range; below, that of the baseline on the same rows subtracted.

    A batch's loss says more about its rows than about the method: the difference says what a method has learnt.
    """
    curves = {runs.label: found for runs in group.rows if (found := _loss_curves(runs))}
    if not curves:
        return False
    base = next((runs.label for runs in group.rows if runs.method in BASELINES and runs.label in curves), None)
    panels = {"task loss": curves}
    if base is not None and len(curves) > 1:
        others = {label: loss_gaps(curve, curves[base]) for label, curve in curves.items() if label != base}
        panels[f"less that of {base}"] = {label: curve for label, curve in others.items() if curve}
    canvas.set_size_inches(7.2, 1.1 + 3.1 * len(panels))
    grid = canvas.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (name, drawn) in zip(grid, panels.items(), strict=True):
        _draw_seeds(axes, drawn, method_styles(group))
        seeds = max(map(len, drawn.values()), default=1)
        axes.set(ylabel=name + (f"\n(mean and range of {seeds} seeds)" if seeds > 1 else ""))
    grid[0].set(title=figure_title(group))
    grid[-1].set(xlabel="training step")
    legend_beside(grid[0])
    return True


# Seed -> step -> task loss.
LossCurves = dict[int, dict[int, float]]


def _draw_seeds(axes: Axes, curves: Mapping[str, LossCurves], styles: Mapping[str, tuple[str, str, Any]]) -> None:
    for label, of_seeds in curves.items():
        # Seeds of one protocol log at the same steps; the intersection guards against a record cut short.
        steps = sorted(set.intersection(*(set(curve) for curve in of_seeds.values())))
        losses = np.array([[curve[step] for step in steps] for curve in of_seeds.values()])
        colour, _, line = styles[label]
        axes.plot(steps, losses.mean(axis=0), color=colour, linestyle=line, linewidth=1.6, label=label)
        if len(losses) > 1:
            axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def _loss_curves(runs: MethodRuns) -> LossCurves:
    curves = {
        record.cell.seed: {point.step: point.losses["task"] for point in record.curve if "task" in point.losses}
        for record in runs.finished
    }
    return {seed: curve for seed, curve in curves.items() if curve}


def loss_gaps(curves: LossCurves, base: LossCurves) -> LossCurves:
    """Differences at the same seed and step, where the rows are the same."""
    return {
        seed: {step: curves[seed][step] - base[seed][step] for step in curves[seed].keys() & base[seed].keys()}
        for seed in sorted(curves.keys() & base.keys())
    }


def _draw_critical_difference(canvas: Canvas, group: Group) -> bool:
    """Mean ranks over tasks, each with half the critical difference to both sides."""
    rows = [row for row in ranked_scores(group) if row.runs.method not in BASELINES]
    tasks = [task for task in group.tasks if any(task in row.averaged for row in rows)]
    if len(rows) < 3 or len(tasks) < MINIMUM_TASKS_FOR_RANKS:
        return False
    scores = np.array([[_task_score(row, task) for row in rows] for task in tasks])
    ranks = average_ranks(scores)
    distance = nemenyi_distance(len(rows), len(tasks))
    canvas.set_size_inches(7.2, 1.7 + 0.3 * len(rows))
    axes = canvas.add_subplot()
    styles = method_styles(group)
    order = np.argsort(ranks, kind="stable")
    for place, index in enumerate(order):
        colour, marker, _ = styles[rows[index].runs.label]
        axes.errorbar(ranks[index], place, xerr=distance / 2, fmt=marker, color=colour, capsize=3, markersize=7)
    axes.set_yticks(range(len(rows)), [rows[index].runs.label for index in order])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set(
        xlabel=f"mean rank over {len(tasks)} tasks (1 is best); Friedman p {friedman(scores):.2g}\n"
        f"apart by more than the critical difference {distance:.1f} (Nemenyi, 5 %):\nbars that do not overlap",
        title=figure_title(group),
    )
    return True


def _task_score(row: MethodScores, task: str) -> float:
    mean = row.tasks[task][0].mean if task in row.tasks else None
    return float("nan") if mean is None else mean


def _score(row: MethodScores) -> Interval:
    assert row.mean is not None
    assert row.mean.mean is not None
    half = row.mean.half_width or 0.0
    return Interval(100 * row.mean.mean, 100 * (row.mean.mean - half), 100 * (row.mean.mean + half))


def _most_tasks(group: Group) -> int:
    """Means over fewer tasks do not compare, and are not drawn."""
    return max((len(row.averaged) for row in ranked_scores(group)), default=0)
