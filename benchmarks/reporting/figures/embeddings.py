"""The figure of task embeddings: where training put the tasks, at three sites, and how alike they are over all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch
from numpy.typing import NDArray

from benchmarks.records.schema import RunRecord, TaskEmbeddings
from benchmarks.reporting.figures.labels import place_labels
from benchmarks.reporting.figures.style import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# From opposed over unrelated to equal.
BOUNDS = (-1.0, -0.6, -0.2, -0.05, 0.05, 0.2, 0.6, 1.0)
SHADES = ("#B24A00", "#E08A4F", "#F3D3BD", "#F7F7F7", "#C5DCED", "#6AA5CF", "#084B7A")
LIMIT = 0.75


def draw_embeddings(label: str, record: RunRecord, tasks: Sequence[str], embeddings: TaskEmbeddings) -> Canvas:
    """The principal components of the first, the middle and the last site, and the cosines between tasks."""
    panels = len(embeddings.maps) + 1
    lines = math.ceil(panels / 2)
    canvas = Canvas(figsize=(7.6, 0.5 + 3.4 * lines), layout="constrained")
    grid = canvas.add_gridspec(lines, 2)
    places = {3: ("first", "middle", "last"), 2: ("first", "last"), 1: ("all sites",)}[len(embeddings.maps)]
    for number, (place, found) in enumerate(zip(places, embeddings.maps, strict=True)):
        axes = canvas.add_subplot(grid[number // 2, number % 2])
        _draw_map(axes, tasks, np.array(found.points))
        axes.set_title(f"{place}: {found.site}" if len(embeddings.maps) > 1 else place, fontsize=8)
        across, up = (f"{100 * share:.0f} % of the variance" for share in found.explained)
        axes.set_xlabel(across, fontsize=8)
        axes.set_ylabel(up, fontsize=8)
    _draw_cosines(canvas.add_subplot(grid[(panels - 1) // 2, (panels - 1) % 2]), tasks, np.array(embeddings.cosine))
    canvas.suptitle(f"{label}: task embeddings, principal components (seed {record.cell.seed})", fontsize=11)
    return canvas


def _draw_map(axes: Axes, tasks: Sequence[str], points: NDArray[np.float64]) -> None:
    spread = np.ptp(points, axis=0).max() or 1.0
    middle = (points.max(axis=0) + points.min(axis=0)) / 2
    # Square and equal on both axes, so that distances can be read.
    scaled = (points - middle) / spread
    for number, (task, (x, y)) in enumerate(zip(tasks, scaled, strict=True)):
        axes.plot(x, y, MARKERS[number % len(MARKERS)], color=COLOURS[number % len(COLOURS)], markersize=6, label=task)
    for (x, y), label in zip(scaled, place_labels(scaled, tasks, limit=LIMIT), strict=True):
        axes.text(label.x, label.y, label.name, fontsize=7, ha="center", va="center")
        if label.leader is not None:
            axes.plot([x, label.leader[0]], [y, label.leader[1]], color="#AAAAAA", linewidth=0.6, zorder=0)
    axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.axhline(-middle[1] / spread, color="#E3E3E3", linewidth=0.7, zorder=0)
    axes.axvline(-middle[0] / spread, color="#E3E3E3", linewidth=0.7, zorder=0)


def _draw_cosines(axes: Axes, tasks: Sequence[str], cosine: NDArray[np.float64]) -> None:
    levels = np.clip(np.searchsorted(BOUNDS, cosine) - 1, 0, len(SHADES) - 1)
    axes.pcolormesh(levels, cmap=ListedColormap(list(SHADES)), vmin=-0.5, vmax=len(SHADES) - 0.5)
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
