"""Where to write the names of points so that they cover neither each other nor the points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DIRECTIONS = 16
DISTANCES = (0.0, 0.07, 0.15, 0.25)
"""Between a marker and its label, nearest first."""

LETTER, LINE, POINT = 0.034, 0.06, 0.035
"""Width of a letter, height of a line, half the size of a marker, in the units of the points."""

FAR = 0.06
"""A label further from its marker than this gets a line to it."""

Box = tuple[float, float, float, float]


class Label(NamedTuple):
    """A name, its centre, and the end of the line that leads to its point, if it needs one."""

    name: str
    x: float
    y: float
    leader: tuple[float, float] | None


def place_labels(points: NDArray[np.float64], names: Sequence[str], *, limit: float) -> list[Label]:
    """Labels of points (n, 2), which lie within [-0.5, 0.5] x [-0.5, 0.5].

    Each label in turn goes to the place around its point that overlaps least with all points and with the labels
    before it, the nearest of equals.

    Args:
        points: where they are.
        names: what to write.
        limit: labels should stay within [-limit, limit] on both axes.
    """
    taken: list[Box] = [(x - POINT, y - POINT, x + POINT, y + POINT) for x, y in points]
    labels = []
    for (x, y), name in zip(points, names, strict=True):
        boxes = list(_around(float(x), float(y), name))
        costs = [_outside(box, limit) + sum(_overlap(box, other) for other in taken) for box in boxes]
        best = boxes[min(range(len(boxes)), key=lambda at: (round(costs[at], 6), at))]
        taken.append(best)
        nearest = min(max(x, best[0]), best[2]), min(max(y, best[1]), best[3])
        is_far = math.dist(nearest, (x, y)) > POINT + FAR
        labels.append(Label(name, (best[0] + best[2]) / 2, (best[1] + best[3]) / 2, nearest if is_far else None))
    return labels


def _around(x: float, y: float, name: str) -> list[Box]:
    """Boxes at growing distance, each just outside of an ellipse around the marker."""
    half_width, half_height = LETTER * len(name) / 2, LINE / 2
    boxes = []
    for distance in DISTANCES:
        for step in range(DIRECTIONS):
            angle = 2 * math.pi * step / DIRECTIONS
            centre_x = x + math.cos(angle) * (half_width + POINT + 0.01 + distance)
            centre_y = y + math.sin(angle) * (half_height + POINT + 0.01 + distance)
            boxes.append((centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height))
    return boxes


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _outside(box: Box, limit: float) -> float:
    return sum(max(0.0, -limit - low) for low in box[:2]) + sum(max(0.0, high - limit) for high in box[2:])
