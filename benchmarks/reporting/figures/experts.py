"""The figure of routing: which experts the tasks use at which layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch
from numpy.typing import NDArray

from benchmarks.records.schema import Routing, SiteRouting
from benchmarks.reporting.figures.style import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 6
MOST_NAMED = 8

# Bounds of the shades of a task's weight on an expert. Rounded numbers may exceed one by their last digit.
BOUNDS = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.01)
SHADES = ("#DFECF5", "#BAD6EA", "#8ABBDC", "#579BC8", "#2474AB", "#084B7A")
NEVER = "#F3D9C6"

Weights = NDArray[np.float64]
Blocks = Mapping[str, Sequence[SiteRouting]]


def draw_routing(title: str, routing: Routing) -> Figure:
    """Heat maps of the weights of experts by task, a panel per layer, and the entropies by layer."""
    blocks = find_blocks(routing.sites)
    shown = _choose_evenly(list(blocks), MOST_PANELS)
    columns, has_entropy = min(2, len(shown)), len(blocks) > 1
    lines = math.ceil(len(shown) / columns)
    heights = [0.3 + 0.15 * len(routing.tasks)] * lines + [1.3] * has_entropy
    figure = new_figure(7.6, 1.5 + sum(heights) + 0.2 * lines)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    for number, name in enumerate(shown):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        _draw_block(axes, name, blocks[name], routing.tasks if number % columns == 0 else None)
    if has_entropy:
        _draw_entropies(figure.add_subplot(grid[lines, :]), blocks)
    figure.suptitle("\n".join([title, *describe_experts(blocks, len(routing.sites))]), fontsize=9)
    patches = [Patch(color=shade, label=f"up to {upper:.1g}") for shade, upper in zip(SHADES, BOUNDS[1:], strict=True)]
    figure.legend(
        handles=[*patches, Patch(color=NEVER, label="never chosen")],
        loc="outside lower center", ncols=7, fontsize=8, handlelength=1.2, columnspacing=1.0,
    )  # fmt: skip
    return figure


def find_blocks(sites: Sequence[SiteRouting]) -> dict[str, list[SiteRouting]]:
    """Sites by repeated block; a single entry where all sites route alike."""
    if all(site.weights == sites[0].weights for site in sites):
        return {f"all {len(sites)} sites alike" if len(sites) > 1 else sites[0].site: [sites[0]]}
    by_prefix: dict[str, list[SiteRouting]] = {}
    for site in sites:
        by_prefix.setdefault(_find_prefix(site), []).append(site)
    layers = [block[0].layer for block in by_prefix.values()]
    if None in layers or len(set(layers)) < len(layers):
        return by_prefix
    return {f"layer {block[0].layer}": block for block in by_prefix.values()}


def _find_prefix(site: SiteRouting) -> str:
    """The site's name up to the number of its layer: stacks that count their layers alike stay apart."""
    parts = site.site.split(".")
    number = str(site.layer)
    return ".".join(parts[: parts.index(number) + 1]) if number in parts else site.site


def _choose_evenly(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, evenly spaced, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(place * (len(names) - 1) / (most - 1))] for place in range(most)]


def _normalise(site: SiteRouting) -> Weights:
    """Weights (tasks, experts) that add up to one for every task."""
    weights = np.array(site.weights, dtype=np.float64)
    proportions: Weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
    return proportions


def find_unused(site: SiteRouting) -> list[int]:
    """Positions of the experts that no task has chosen."""
    return [int(expert) for expert in np.flatnonzero(np.array(site.shares).max(axis=0) == 0)]


def _draw_block(axes: Axes, name: str, sites: Sequence[SiteRouting], tasks: Sequence[str] | None) -> None:
    """One layer: experts from left to right, site by site; tasks from top to bottom, named if `tasks` is given."""
    panels = []
    for site in sites:
        weights = _normalise(site)
        # Below the lowest bound: the colour for what is never chosen.
        weights[:, find_unused(site)] = -1
        panels.append(weights)
    ends = np.cumsum([panel.shape[1] for panel in panels])
    shades = ListedColormap(list(SHADES)).with_extremes(under=NEVER, bad="white")
    mesh = np.ma.masked_equal(np.concatenate(panels, axis=1), 0)
    axes.pcolormesh(mesh, cmap=shades, norm=BoundaryNorm(BOUNDS, len(SHADES)), rasterized=True)
    axes.set(xlim=(0, ends[-1]), ylim=(len(mesh), 0))
    axes.set_title(name, fontsize=8.5, pad=3)
    axes.set_yticks(np.arange(len(mesh)) + 0.5, tasks or [""] * len(mesh), fontsize=7.5)
    if len(sites) > 1:
        middles = [end - panel.shape[1] / 2 for end, panel in zip(ends, panels, strict=True)]
        axes.set_xticks(middles, [site.role for site in sites], fontsize=7.5)
        for end in ends[:-1]:
            axes.axvline(end, color="#777777", linewidth=0.7)
    else:
        axes.set_xticks(np.arange(ends[-1]) + 0.5, [str(number + 1) for number in range(ends[-1])], fontsize=7.5)
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#777777")
    axes.grid(visible=False)


def _draw_entropies(axes: Axes, blocks: Blocks) -> None:
    """Two entropies by layer: the distance between them is what the choice of the task decides."""
    by_block = [np.array([measure_entropies(site) for site in sites]).mean(axis=0) for sites in blocks.values()]
    places = range(len(blocks))
    together, single = np.array(by_block).T
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


def measure_entropies(site: SiteRouting) -> tuple[float, float]:
    """Entropy of the mean over tasks, and the mean of single choices; both as shares of log(experts)."""
    mean = _normalise(site).mean(axis=0)
    largest = math.log(len(mean)) if len(mean) > 1 else 1.0
    used = mean[mean > 0]
    return float(-(used * np.log(used)).sum()) / largest, float(np.mean(site.entropy)) / largest


def describe_experts(blocks: Blocks, all_sites: int) -> list[str]:
    """How to read the shades, and which experts are dead; of sites that route alike, their entropies."""
    sites = [site for block in blocks.values() for site in block]
    experts = len(sites[0].weights[0])
    order = f"; at every site experts 1 to {experts} from left to right" if len(sites) > 1 else ""
    lines = [f"Shade: weight of an expert among those of a task{order}.", _describe_unused(blocks, sites, experts)]
    if len(sites) == 1:
        together, single = measure_entropies(sites[0])
        lines.append(
            f"Entropy of one choice's weights {single:.2f}, of the use by all tasks together {together:.2f} "
            f"of the largest ({all_sites} site{'s' if all_sites > 1 else ''})."
        )
    return lines


def _describe_unused(blocks: Blocks, sites: Sequence[SiteRouting], experts: int) -> str:
    dead = [
        f"{f'{name} {site.role} ' if len(sites) > 1 else ''}{expert + 1}"
        for name, block in blocks.items()
        for site in block
        for expert in find_unused(site)
    ]
    if not dead:
        return "Every expert is chosen by some task."
    if len(dead) <= MOST_NAMED:
        return f"Experts that no task chooses: {', '.join(dead)}."
    everywhere = set.intersection(*({expert + 1 for expert in find_unused(site)} for site in sites))
    named = f"everywhere: {', '.join(map(str, sorted(everywhere)))}" if everywhere else "none of them everywhere"
    return f"Experts that no task chooses: on average {len(dead) / len(sites):.1f} of {experts} at a site ({named})."
