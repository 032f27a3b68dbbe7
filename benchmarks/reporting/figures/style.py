"""What all figures share: colours, style, and SVG whose bytes depend on what is drawn and on matplotlib alone."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline

from benchmarks.reporting.comparable import BASELINES, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart with any colour vision and, by the markers, in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("solid", "dashed", "dashdot", "dotted")
BASELINE_COLOUR = "#777777"

STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "moepeft",
}


@contextmanager
def drawing() -> Iterator[None]:
    """Inside, figures look as they should: bytes must not depend on a matplotlibrc in the user's home."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(cast(Any, STYLE))
        yield


def new_canvas() -> Canvas:
    """An empty figure of the usual size."""
    return Canvas(figsize=(7.2, 4.2), layout="constrained")


def svg_bytes(canvas: Canvas, description: str) -> bytes:
    """The drawing, without date and without the name of what drew it: equal drawings give equal bytes."""
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Description": description})
    return buffer.getvalue()


def cells(corners: Sequence[tuple[float, float]], colour: str, height: float) -> PathPatch:
    """Cells of width and height 1 in the plot's units with these upper left corners, as strokes of one path.

    Args:
        corners: (x, y), y pointing down.
        colour: of all of them.
        height: of a cell on paper, in points. A stroke is half as long to write as a rectangle.
    """
    vertices = [end for x, y in corners for end in ((x, y + 0.5), (x + 1, y + 0.5))]
    codes = [Outline.MOVETO, Outline.LINETO] * len(corners)
    outline = Outline(np.array(vertices), codes)
    return PathPatch(outline, facecolor="none", edgecolor=colour, linewidth=height, capstyle="butt")


def method_styles(group: Group) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line of every method: the same in all figures of a group."""
    methods = [runs.label for runs in group.rows if runs.method not in BASELINES]
    styles = {
        label: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i // len(COLOURS) % len(LINES)])
        for i, label in enumerate(methods)
    }
    baselines = [runs.label for runs in group.rows if runs.method in BASELINES]
    return styles | {label: (BASELINE_COLOUR, ".", LINES[1 + i % 3]) for i, label in enumerate(baselines)}


def figure_title(group: Group) -> str:
    """The group's label, cut where it would not fit."""
    return group.label if len(group.label) <= 60 else f"{group.label[:57]}..."


def legend_beside(axes: Axes) -> None:
    """The legend to the right of the axes."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
