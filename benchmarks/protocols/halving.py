"""Learning rates by successive halving (Jamieson and Talwalkar 2016), on a grid that grows until the best is inside.

Every method gets the same first grid, the same rungs and the same rule. What a method gets beyond is what its best
rate asks for. A method whose best rate still lies at an end of its grid is reported as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import PositiveFloat, PositiveInt

from benchmarks.protocols.frozen import Frozen

WORST = -1.0
"""A trial that fails, or ends below this score, has this score: by how much it missed must not decide a mean."""

Scores = Callable[[Sequence[float], int], Mapping[float, float]]
"""Rates and steps -> the mean score of each rate over the tuning seeds."""


class Halving(Frozen):
    """How a method's rate is found.

    Attributes:
        rates: of the first rung; the grid grows by the same factor until the best rate lies inside of it.
        seeds: of the trials.
        first_steps: of the first rung; the better half of the rates goes on to the last one. None: there is one rung.
        extensions: how often the grid may grow.
    """

    rates: tuple[PositiveFloat, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    seeds: tuple[int, ...] = (1000, 1001)
    first_steps: PositiveInt | None = 150
    extensions: int = 3


@dataclass(frozen=True)
class Choice:
    """A method's rate.

    Attributes:
        method: its name.
        rate: the best one, the lowest of equals.
        tried: every rate of the last rung with its mean score, ascending.
        at_edge: the best rate lacks a neighbour: a better one may lie beyond all that was tried.
    """

    method: str
    rate: float
    tried: tuple[tuple[float, float], ...]
    at_edge: bool


def choose(method: str, halving: Halving, steps: int, scores: Scores) -> Choice:
    """Find the rate of one method.

    Args:
        method: its name.
        halving: grid, rungs and extensions.
        steps: of the last rung.
        scores: makes trials, or looks them up.
    """
    rates = sorted(halving.rates)
    factor = (rates[-1] / rates[0]) ** (1 / max(1, len(rates) - 1))
    if halving.first_steps is not None:
        first = scores(rates, halving.first_steps)
        rates = sorted(rates, key=lambda rate: -first[rate])[: math.ceil(len(rates) / 2)]
    last = dict(scores(rates, steps))
    for _ in range(halving.extensions):
        outer = _next_beyond(last, factor)
        if outer is None:
            break
        last |= scores((outer,), steps)
    tried = tuple(sorted(last.items()))
    return Choice(method, _best(last), tried, at_edge=len(rates) > 1 and _next_beyond(last, factor) is not None)


def floored(score: float | None) -> float:
    """The score of a trial; None of one that failed."""
    return WORST if score is None else max(WORST, score)


def _best(scores: Mapping[float, float]) -> float:
    return max(sorted(scores), key=lambda rate: scores[rate])


def _next_beyond(scores: Mapping[float, float], factor: float) -> float | None:
    """The rate to try next: a neighbour of the best one that was not tried; None if both neighbours were."""
    best = _best(scores)
    for neighbour in (best * factor, best / factor):
        if not any(math.isclose(neighbour, rate, rel_tol=0.05) for rate in scores):
            return float(f"{neighbour:.2g}")
    return None
