"""Figures of the mechanisms: scores over what was varied, with the bound of a task-blind answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.mechanisms.experiments import Experiment
from benchmarks.mechanisms.tables import BOUND, interval
from benchmarks.reporting.figures.style import (
    BASELINE_COLOUR,
    COLOURS,
    LINES,
    MARKERS,
    new_figure,
    put_legend_beside,
    use_style,
    write_svg,
)

BREADTH = 0.7
"""Of a word's place on the axis, where methods stand side by side."""


def can_draw(experiment: Experiment) -> bool:
    """Whether the experiment varies one field, which is the axis or tells the panels apart."""
    return len(experiment.vary) == 1


def draw_scores(experiment: Experiment, frame: pd.DataFrame, description: str) -> bytes:
    """Mean R2 over the one field that the experiment varies, or over parameters; an SVG with its description."""
    by_size = bool(experiment.ranks_of_reference)
    axis = "parameters" if by_size else next(iter(experiment.vary))
    with use_style():
        figure = new_figure()
        panels = sorted(frame[next(iter(experiment.vary))].unique()) if by_size else [None]
        plots = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for plot, panel in zip(plots, panels, strict=True):
            field = next(iter(experiment.vary))
            some = frame if panel is None else frame[frame[field] == panel]
            names = some["method"].unique()
            for number, name in enumerate(names):
                aside = BREADTH * ((number + 0.5) / len(names) - 0.5)
                _draw_line(plot, some[some["method"] == name], axis, name, number, aside)
            if not by_size:
                _draw_bound(plot, some.groupby(axis, sort=False)["bound"].mean())
            else:
                plot.axhline(some["bound"].mean(), color=BASELINE_COLOUR, linestyle="dotted", label=BOUND)
                plot.set_xscale("log")
                plot.set_title(f"{field} {panel:g}")
            plot.set_xlabel(axis)
        plots[0].set_ylabel("R2, mean over tasks")
        plots[0].set_ylim(-0.1, 1.05)
        put_legend_beside(plots[-1])
        return write_svg(figure, description)


def _draw_bound(plot, bound: pd.Series) -> None:  # type: ignore[no-untyped-def]
    """What a task-blind answer reaches at most: a line over numbers, a dash at every word."""
    how = {"colors" if _are_words(bound.index) else "color": BASELINE_COLOUR, "linestyle": "dotted", "label": BOUND}
    if _are_words(bound.index):
        places = np.arange(len(bound))
        plot.hlines(bound, places - BREADTH / 2, places + BREADTH / 2, **how)
    else:
        plot.plot(bound.index, bound, **how)


def _are_words(places: Iterable[object]) -> bool:
    return any(isinstance(place, str) for place in places)


def _draw_line(  # type: ignore[no-untyped-def]
    plot, some: pd.DataFrame, axis: str, name: str, number: int, aside: float
) -> None:
    """One method: means over seeds with their intervals; words have no order, so no line joins them."""
    if axis == "parameters":
        groups: list[tuple[Any, pd.Series]] = [
            (group["parameters"].mean(), group["score"]) for _, group in some.groupby("size")
        ]
    else:
        groups = [(value, group["score"]) for value, group in some.groupby(axis, sort=False)]
    places = [place for place, _ in groups]
    words = _are_words(places)
    means, halves = zip(*(interval(scores.dropna().tolist()) for _, scores in groups), strict=True)
    plot.errorbar(
        np.arange(len(places)) + aside if words else places,
        means,
        yerr=np.nan_to_num(halves),
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle="none" if words else LINES[number // len(COLOURS) % len(LINES)],
        capsize=2,
        label=name,
    )
    if words:
        plot.set_xticks(np.arange(len(places)), places)
    elif axis == "tasks":
        plot.set_xscale("log", base=2)
