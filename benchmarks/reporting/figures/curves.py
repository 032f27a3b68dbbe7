"""Task loss over steps, mean of the seeds and their range; below, less that of a baseline on the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd

from benchmarks.reporting.figures.style import Style, new_figure, put_legend_beside, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# So many parts of a curve have no logged step in common.
PARTS = 16


def subtract_baseline(losses: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Losses less those of `baseline` at the same seed and step, where the rows are the same.

    Args:
        losses: columns ``label``, ``seed``, ``step``, ``value``.
        baseline: a label.
    """
    base = losses[losses["label"] == baseline]
    both = losses[losses["label"] != baseline].merge(base, on=["seed", "step"], suffixes=("", "_base"))
    return both.assign(value=both["value"] - both["value_base"])[["label", "seed", "step", "value"]]


def find_window(logged: int) -> int:
    """How many of the logged steps are drawn as their mean."""
    return max(1, logged // PARTS)


def smooth(curve: pd.DataFrame) -> pd.DataFrame:
    """The running mean of a sixteenth of the logged steps: a single step's loss is that of its few rows."""
    return curve.rolling(find_window(len(curve)), min_periods=1).mean()


def draw_curves(losses: pd.DataFrame, baseline: str | None, styles: Mapping[str, Style], title: str) -> Figure:
    """Draw the smoothed losses of single batches (columns ``label``, ``seed``, ``step``, ``value``).

    A batch's loss says more about its rows than about the method: the difference to a baseline on the same rows says
    what a method has learnt.
    """
    panels = {"task loss": losses}
    if baseline is not None and losses["label"].nunique() > 1:
        panels[f"less that of {baseline}"] = subtract_baseline(losses, baseline)
    figure = new_figure(7.2, 1.1 + 3.1 * len(panels))
    grid = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (name, shown) in zip(grid, panels.items(), strict=True):
        _draw_seeds(axes, shown, styles)
        seeds = shown["seed"].nunique()
        axes.set(ylabel=name + (f"\n(mean and range of {seeds} seeds)" if seeds > 1 else ""))
    grid[0].set(title=shorten(title))
    window = find_window(losses["step"].nunique())
    grid[-1].set(xlabel="training step" + (f" (running mean of {window} logged ones)" if window > 1 else ""))
    put_legend_beside(grid[0])
    return figure


def _draw_seeds(axes: Axes, losses: pd.DataFrame, styles: Mapping[str, Style]) -> None:
    for label, rows in losses.groupby("label", sort=False):
        # Seeds of one protocol log at the same steps; dropping the rest guards against a record cut short.
        curve = smooth(rows.pivot_table(index="step", columns="seed", values="value").dropna())
        style = styles[str(label)]
        axes.plot(curve.index, curve.mean(axis=1), color=style.colour, linestyle=style.line, linewidth=1.6, label=label)
        if curve.shape[1] > 1:
            axes.fill_between(
                curve.index, curve.min(axis=1), curve.max(axis=1), color=style.colour, alpha=0.15, linewidth=0
            )
