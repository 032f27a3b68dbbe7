"""The critical difference diagram: mean ranks over tasks, and who is not told apart (Demsar 2006)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd
from scikit_posthocs import critical_difference_diagram

from benchmarks.reporting.figures.style import Style, new_figure, shorten
from benchmarks.statistics.ranks import rank_methods

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_ranks(scores: pd.DataFrame, styles: Mapping[str, Style], title: str) -> Figure:
    """Draw the ranks of scores (tasks, methods); a bar joins methods that Nemenyi's test does not tell apart."""
    ranks = rank_methods(scores)
    figure = new_figure(7.2, 1.6 + 0.22 * len(ranks.mean))
    axes = figure.add_subplot()
    axes.grid(visible=False)
    drawn = critical_difference_diagram(
        ranks.mean,
        ranks.pairs,
        ax=axes,
        color_palette={method: styles[method].colour for method in ranks.mean.index},
        label_fmt_left="{label} ({rank:.1f})",
        label_fmt_right="({rank:.1f}) {label}",
        marker_props={"s": 30},
        text_h_margin=0.05,
    )
    for bar in drawn["crossbars"]:
        for line in bar:
            # Its points come out of a set, so that their order is another one in every process.
            line.set_xdata(sorted(line.get_xdata()))
    axes.set_title(
        f"{shorten(title)}: mean rank over {len(scores)} tasks, 1 is best\n"
        f"Friedman p {ranks.p_value:.2g}; a bar joins what Nemenyi's test at 5 % does not tell apart",
        fontsize=9,
    )
    return figure
