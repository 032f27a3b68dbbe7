"""Mean score against what it costs, with intervals on both axes and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator

from benchmarks.reporting.figures.style import Style, new_figure, put_legend_beside, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_SPAN = 2.0
"""Points that the axis of scores covers at least."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Point:
    """A method in the plane of cost and score."""

    label: str
    cost: Interval
    score: Interval


def find_pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats in cost without losing in score, by rising cost."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if not front or scores[index] > scores[front[-1]]:
            front.append(index)
    return front


def draw_trade_off(
    points: Sequence[Point],
    baselines: Mapping[str, float],
    styles: Mapping[str, Style],
    *,
    title: str,
    cost: str,
    score: str,
) -> Figure:
    """Draw the points, the Pareto front, and a horizontal line for each baseline's score.

    Args:
        points: at least one.
        baselines: scores by label.
        styles: by label.
        title: of the figure.
        cost: name of the horizontal axis.
        score: name of the vertical axis.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    for point in points:
        axes.errorbar(
            point.cost.value,
            point.score.value,
            xerr=[[point.cost.value - point.cost.low], [point.cost.high - point.cost.value]],
            yerr=[[point.score.value - point.score.low], [point.score.high - point.score.value]],
            fmt=styles[point.label].marker,
            color=styles[point.label].colour,
            capsize=3,
            markersize=7,
            label=point.label,
        )
    for label, value in baselines.items():
        axes.axhline(value, color=styles[label].colour, linestyle=styles[label].line, linewidth=1.2, label=label)
    costs, scores = [point.cost.value for point in points], [point.score.value for point in points]
    front = find_pareto_front(costs, scores)
    axes.step(
        [costs[i] for i in front], [scores[i] for i in front],
        where="post", color="#999999", linewidth=1, zorder=1, label="Pareto front",
    )  # fmt: skip
    _widen_scores(axes)
    _scale_costs(axes, [bound for point in points for bound in (point.cost.low, point.cost.high)])
    axes.set(xlabel=cost, ylabel=score, title=shorten(title))
    put_legend_beside(axes)
    return figure


def _widen_scores(axes: Axes) -> None:
    """A vertical axis that does not blow up differences of no account."""
    low, high = axes.get_ylim()
    if high - low < LEAST_SPAN:
        axes.set_ylim((low + high - LEAST_SPAN) / 2, (low + high + LEAST_SPAN) / 2)


def _scale_costs(axes: Axes, values: Sequence[float]) -> None:
    """A log axis with round numbers where costs span a decade, a linear axis where they do not."""
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
