"""What all figures share: colours, style, SVG without a date."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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


class Style(NamedTuple):
    """How one method is drawn."""

    colour: str
    marker: str
    line: str


@contextmanager
def use_style() -> Iterator[None]:
    """Inside, figures look as they should, whatever matplotlibrc the user has."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(cast(Any, STYLE))
        yield


def new_figure(width: float = 7.2, height: float = 4.2) -> Figure:
    """An empty figure, in inches. Its canvas can measure text, which placing labels needs."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_svg(figure: Figure, description: str) -> bytes:
    """The figure without date and name of the program: one matplotlib draws equal figures as equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None, "Description": description})
    return buffer.getvalue()


def choose_styles(methods: Sequence[str], baselines: Sequence[str]) -> dict[str, Style]:
    """Colour, marker and line by label: the same in all figures of one comparison."""
    styles = {
        label: Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i // len(COLOURS) % len(LINES)])
        for i, label in enumerate(methods)
    }
    grey = {label: Style(BASELINE_COLOUR, ".", LINES[1 + i % 3]) for i, label in enumerate(baselines)}
    return styles | grey


def shorten(title: str) -> str:
    """A title cut where it would not fit."""
    return title if len(title) <= 60 else f"{title[:57]}..."


def put_legend_beside(axes: Axes) -> None:
    """The legend to the right of the axes."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
