"""The figure of routing: which experts the tasks use at which layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch
from numpy.typing import NDArray

from benchmarks.records.schema import Routing, RunRecord, SiteRouting
from benchmarks.reporting.figures.style import COLOURS, cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 6
MOST_NAMED = 8

# Upper ends of the shades of a task's weight on an expert.
LEVELS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
SHADES = ("#DFECF5", "#BAD6EA", "#8ABBDC", "#579BC8", "#2474AB", "#084B7A")
NEVER = "#F3D9C6"
CELL_POINTS = 11.0
"""Height of a line of a panel on paper."""

Weights = NDArray[np.float64]


def draw_routing(label: str, record: RunRecord, routing: Routing) -> Canvas:
    """Heat maps of the weights of experts by task, a panel per layer, and the entropies by layer."""
    blocks = blocks_of(routing.sites)
    shown = _spread(list(blocks), MOST_PANELS)
    page = _Page(len(routing.tasks), max(map(len, routing.tasks)), len(shown), has_entropy=len(blocks) > 1)
    canvas = Canvas(figsize=(page.width, page.height))
    for number, name in enumerate(shown):
        axes = canvas.add_axes(page.panel(number))
        _draw_block(axes, name, blocks[name], routing.tasks, labelled=number % page.columns == 0)
    if page.has_entropy:
        _draw_entropy(canvas.add_axes(page.entropy()), blocks)
    rows = max(routing.rows.values())
    title = f"{label}: experts by task (seed {record.cell.seed}, {rows} rows per task)"
    canvas.text(0.5, page.share(page.height - 0.22), title, fontsize=11, ha="center")
    for number, line in enumerate(subtitle(blocks, len(routing.sites))):
        canvas.text(0.5, page.share(0.72 - 0.16 * number), line, fontsize=8, ha="center")
    levels = [f"up to {upper:g}" for upper in LEVELS]
    patches = [Patch(color=shade, label=text) for shade, text in zip(SHADES, levels, strict=True)]
    canvas.legend(
        handles=[*patches, Patch(color=NEVER, label="never chosen")],
        loc="lower center", bbox_to_anchor=(0.5, 0), ncols=7, fontsize=8, handlelength=1.2, columnspacing=1.0,
    )  # fmt: skip
    return canvas


@dataclass(frozen=True)
class _Page:
    """Where everything stands, in inches from the lower left corner: nothing depends on the size of a text.

    Attributes:
        tasks: lines of a panel.
        letters: of the longest task name.
        panels: number of them.
        has_entropy: whether the entropies are drawn below.
    """

    tasks: int
    letters: int
    panels: int
    has_entropy: bool

    width, line, gap, below = 7.6, CELL_POINTS / 72, 0.12, 1.0

    @property
    def columns(self) -> int:
        return min(2, self.panels)

    @property
    def block(self) -> float:
        """Height of a panel with what stands above and below it."""
        return self.line * self.tasks + 0.48

    @property
    def entropy_height(self) -> float:
        return 1.9 if self.has_entropy else 0.0

    @property
    def height(self) -> float:
        return 0.35 + math.ceil(self.panels / self.columns) * self.block + self.entropy_height + self.below

    @property
    def left(self) -> float:
        # The entropies' numbers and their heading need some space as well.
        return max(0.8, 0.15 + 0.066 * self.letters)

    def share(self, inches: float) -> float:
        """Of the height."""
        return inches / self.height

    def panel(self, number: int) -> tuple[float, float, float, float]:
        """Left, bottom, width and height as shares of the page."""
        width = (self.width - self.left - 0.15 - self.gap * (self.columns - 1)) / self.columns
        left = self.left + (number % self.columns) * (width + self.gap)
        bottom = self.height - 0.35 - (number // self.columns + 1) * self.block + 0.22
        return left / self.width, self.share(bottom), width / self.width, self.share(self.line * self.tasks)

    def entropy(self) -> tuple[float, float, float, float]:
        """The same for the entropies."""
        width = self.width - self.left - 0.15
        return self.left / self.width, self.share(self.below + 0.35), width / self.width, self.share(1.15)


def blocks_of(sites: Sequence[SiteRouting]) -> dict[str, list[SiteRouting]]:
    """Sites by repeated block; a single entry where all sites route alike."""
    if all(site.weights == sites[0].weights for site in sites):
        return {f"all {len(sites)} sites alike" if len(sites) > 1 else sites[0].site: [sites[0]]}
    by_prefix: dict[str, list[SiteRouting]] = {}
    for site in sites:
        by_prefix.setdefault(_prefix(site), []).append(site)
    layers = [found[0].layer for found in by_prefix.values()]
    if None in layers or len(set(layers)) < len(layers):
        return by_prefix
    return {f"layer {found[0].layer}": found for found in by_prefix.values()}


def _prefix(site: SiteRouting) -> str:
    """The site's name up to the number of its layer: stacks that count their layers alike stay apart."""
    parts = site.site.split(".")
    number = str(site.layer)
    return ".".join(parts[: parts.index(number) + 1]) if number in parts else site.site


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, evenly spaced, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(at * (len(names) - 1) / (most - 1))] for at in range(most)]


def _proportions(site: SiteRouting) -> Weights:
    """Weights (tasks, experts) that add up to one for every task."""
    weights = np.array(site.weights, dtype=np.float64)
    proportions: Weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
    return proportions


def _unused(site: SiteRouting) -> list[int]:
    """Positions of the experts that no task has chosen."""
    return [int(at) for at in np.flatnonzero(np.array(site.shares).max(axis=0) == 0)]


def _draw_block(axes: Axes, name: str, sites: Sequence[SiteRouting], tasks: Sequence[str], *, labelled: bool) -> None:
    corners: dict[str, list[tuple[float, float]]] = {NEVER: [], **{shade: [] for shade in SHADES}}
    start, ends, middles = 0, [0], []
    for site in sites:
        proportions = _proportions(site)
        corners[NEVER] += [(start + at, row) for at in _unused(site) for row in range(len(tasks))]
        for (row, at), weight in np.ndenumerate(proportions):
            if weight > 0:
                corners[_shade(float(weight), LEVELS, SHADES)].append((start + at, row))
        middles.append(start + proportions.shape[1] / 2)
        start += proportions.shape[1]
        ends.append(start)
    _fill(axes, corners, CELL_POINTS)
    axes.set(xlim=(0, start), ylim=(len(tasks), 0))
    axes.set_title(name, fontsize=8.5, pad=3)
    axes.set_yticks(np.arange(len(tasks)) + 0.5, tasks if labelled else [""] * len(tasks), fontsize=7.5)
    if len(sites) > 1:
        axes.set_xticks(middles, [site.role for site in sites], fontsize=7.5)
        for end in ends[1:-1]:
            axes.axvline(end, color="#777777", linewidth=0.7)
    else:
        axes.set_xticks(np.arange(start) + 0.5, [str(number) for number in range(1, start + 1)], fontsize=7.5)
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#777777")
    axes.grid(visible=False)


def _shade(value: float, levels: Sequence[float], shades: Sequence[str]) -> str:
    # Rounded numbers may exceed the highest level by their last digit.
    return next((shade for upper, shade in zip(levels, shades, strict=True) if value <= upper), shades[-1])


def _fill(axes: Axes, corners: dict[str, list[tuple[float, float]]], height: float) -> None:
    for colour, found in corners.items():
        if found:
            axes.add_patch(cells(found, colour, height))


def _draw_entropy(axes: Axes, blocks: dict[str, list[SiteRouting]]) -> None:
    """Two entropies by layer: the distance between them is what the choice of the task decides."""
    found = [np.array([_entropies(site) for site in sites]).mean(axis=0) for sites in blocks.values()]
    places = range(len(blocks))
    together, single = np.array(found).T
    axes.plot(places, together, color=COLOURS[1], marker="s", linestyle="dashed", label="use by all tasks together")
    axes.plot(places, single, color=COLOURS[0], marker="o", label="weights of one choice")
    names = [name.removeprefix("layer ") for name in blocks]
    heading = "layer"
    if any(len(name) > 3 for name in names):
        names, heading = [str(place) for place in places], "layer, in the order of the model"
    axes.set_xticks(places, names, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel(heading, fontsize=8.5)
    axes.set_ylabel("entropy, share\nof the largest", fontsize=8.5)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=2)


def _entropies(site: SiteRouting) -> tuple[float, float]:
    """Of the mean over tasks, and the mean of single choices; both as shares of log(experts)."""
    mean = _proportions(site).mean(axis=0)
    largest = math.log(len(mean)) if len(mean) > 1 else 1.0
    used = mean[mean > 0]
    return float(-(used * np.log(used)).sum()) / largest, float(np.mean(site.entropy)) / largest


def subtitle(blocks: dict[str, list[SiteRouting]], all_sites: int) -> list[str]:
    """How to read the shades, and which experts are dead; of sites that route alike, their entropies."""
    sites = [site for found in blocks.values() for site in found]
    experts = len(sites[0].weights[0])
    shade = "Shade: weight of an expert among those of a task"
    order = f"; at every site experts 1 to {experts} from left to right" if len(sites) > 1 else ""
    lines = [f"{shade}{order}.", _unused_line(blocks, sites, experts)]
    if len(sites) == 1:
        together, single = _entropies(sites[0])
        lines.append(
            f"Entropy of one choice's weights {single:.2f}, of the use by all tasks together {together:.2f} "
            f"of the largest ({all_sites} site{'s' if all_sites > 1 else ''})."
        )
    return lines


def _unused_line(blocks: dict[str, list[SiteRouting]], sites: Sequence[SiteRouting], experts: int) -> str:
    dead = [
        f"{f'{name} {site.role} ' if len(sites) > 1 else ''}{at + 1}"
        for name, found in blocks.items()
        for site in found
        for at in _unused(site)
    ]
    if not dead:
        return "Every expert is chosen by some task."
    if len(dead) <= MOST_NAMED:
        return f"Experts that no task chooses: {', '.join(dead)}."
    everywhere = set.intersection(*({at + 1 for at in _unused(site)} for site in sites))
    named = f"everywhere: {', '.join(map(str, sorted(everywhere)))}" if everywhere else "none of them everywhere"
    return f"Experts that no task chooses: on average {len(dead) / len(sites):.1f} of {experts} at a site ({named})."
