"""The figure of task embeddings: where training put the tasks, at three sites, and how alike they are over all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from adjustText import adjust_text
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from benchmarks.records.schema import TaskEmbeddings
from benchmarks.reporting.figures.style import COLOURS, MARKERS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From opposed over unrelated to equal.
BOUNDS = (-1.0, -0.6, -0.2, -0.05, 0.05, 0.2, 0.6, 1.0)
SHADES = ("#B24A00", "#E08A4F", "#F3D3BD", "#F7F7F7", "#C5DCED", "#6AA5CF", "#084B7A")
PLACES = {3: ("first", "middle", "last"), 2: ("first", "last"), 1: ("all sites",)}


def draw_embeddings(title: str, tasks: Sequence[str], embeddings: TaskEmbeddings) -> Figure:
    """The principal components of the first, the middle and the last site, and the cosines between tasks."""
    lines = math.ceil((len(embeddings.maps) + 1) / 2)
    figure = new_figure(7.6, 0.5 + 3.4 * lines)
    panels = figure.subplots(lines, 2, squeeze=False).ravel()
    for axes, place, site in zip(panels, PLACES[len(embeddings.maps)], embeddings.maps, strict=False):
        points = np.array(site.points)
        _draw_points(axes, tasks, points)
        axes.set_title(f"{place}: {site.site}" if len(embeddings.maps) > 1 else place, fontsize=8)
        across, up = (f"{100 * share:.0f} % of the variance" for share in site.explained)
        axes.set_xlabel(across, fontsize=8)
        axes.set_ylabel(up, fontsize=8)
    _draw_cosines(panels[len(embeddings.maps)], tasks, np.array(embeddings.cosine))
    for axes in panels[len(embeddings.maps) + 1 :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=11)
    # Labels are placed on paper, so that the panels must have their sizes first.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, site in zip(panels, embeddings.maps, strict=False):
        _label_points(axes, tasks, np.array(site.points))
    return figure


def _draw_points(axes: Axes, tasks: Sequence[str], points: NDArray[np.float64]) -> None:
    for number, (task, (x, y)) in enumerate(zip(tasks, points, strict=True)):
        marker, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
        axes.scatter(x, y, marker=marker, color=colour, s=36, label=task)
    # Square and equal on both axes, so that distances can be read.
    middle, reach = (points.max(axis=0) + points.min(axis=0)) / 2, 0.75 * (np.ptp(points, axis=0).max() or 1.0)
    axes.set(
        xlim=(middle[0] - reach, middle[0] + reach), ylim=(middle[1] - reach, middle[1] + reach), aspect="equal",
        xticks=[], yticks=[],
    )  # fmt: skip
    axes.axhline(0, color="#E3E3E3", linewidth=0.7, zorder=0)
    axes.axvline(0, color="#E3E3E3", linewidth=0.7, zorder=0)


def _label_points(axes: Axes, tasks: Sequence[str], points: NDArray[np.float64]) -> None:
    # The markers, about as large as they are on paper.
    half = 0.025 * (axes.get_xlim()[1] - axes.get_xlim()[0])
    markers = [Bbox([point - half, point + half]) for point in points]
    texts = [axes.text(x, y, task, fontsize=7) for task, (x, y) in zip(tasks, points, strict=True)]
    adjust_text(
        texts, points[:, 0], points[:, 1], ax=axes, objects=markers, expand=(1.2, 1.4), iter_lim=100,
        arrowprops={"arrowstyle": "-", "color": "#AAAAAA", "linewidth": 0.6},
    )  # fmt: skip


def _draw_cosines(axes: Axes, tasks: Sequence[str], cosine: NDArray[np.float64]) -> None:
    shades = ListedColormap(list(SHADES))
    axes.pcolormesh(np.clip(cosine, -1, 1), cmap=shades, norm=BoundaryNorm(BOUNDS, len(SHADES)))
    axes.set(xlim=(0, len(tasks)), ylim=(len(tasks), 0), aspect="equal")
    axes.set_title("cosine between tasks, mean over sites", fontsize=8)
    axes.set_yticks(np.arange(len(tasks)) + 0.5, tasks, fontsize=7)
    axes.set_xticks(np.arange(len(tasks)) + 0.5, tasks, fontsize=7, rotation=90)
    axes.tick_params(length=0, pad=2)
    axes.grid(visible=False)
    patches = [
        Patch(facecolor=shade, edgecolor="#BBBBBB", linewidth=0.5, label=f"{low:g} to {high:g}")
        for shade, (low, high) in zip(SHADES, itertools.pairwise(BOUNDS), strict=True)
    ]
    axes.legend(handles=patches[::-1], fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.0)
