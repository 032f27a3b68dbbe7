"""Intervals, verdicts and power for few runs: three to five are the rule here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.8
SMALLEST_P = 1e-12
QUADRATURE = 4096
EQUIVALENCE_BAND = 0.005
"""Differences of half a point either way count as none, unless a protocol declares another band."""

Verdict = Literal["better", "worse", "equivalent", "undecided"]
MOST_LOOKS = 5


@lru_cache(maxsize=MOST_LOOKS)
def level_at_each_of(looks: int) -> float:
    """The level at which each of several looks decides, so that all of them together err in 5 % of cases.

    A look is a test on all rows so far; the groups of rows that come between looks are equally large (Pocock 1977,
    Biometrika 64, 191-199).

    Raises:
        ValueError: there are less looks than one, or more than `MOST_LOOKS`.
    """
    if not 1 <= looks <= MOST_LOOKS:
        raise ValueError(f"looks = {looks}: wanted a whole number from 1 to {MOST_LOOKS}")
    if looks == 1:
        return 1 - CONFIDENCE
    number = np.arange(1, looks + 1)
    correlation = np.sqrt(np.minimum.outer(number, number) / np.maximum.outer(number, number))
    none_errs = stats.multivariate_normal(cov=correlation, seed=0)

    def excess(bound: float) -> float:
        limits = np.full(looks, bound)
        return float(none_errs.cdf(limits, lower_limit=-limits)) - CONFIDENCE

    return float(2 * stats.norm.sf(optimize.brentq(excess, 1.9, 3.0, xtol=1e-5)))


@dataclass(frozen=True, slots=True)
class Difference:
    """How much a method scores above a reference, and what is known of its error.

    Runs and test examples are crossed: every run is tested on the same examples. So the variance of the estimate is
    that of readers who judge the same cases (Obuchowski and Rockette 1995, Communications in Statistics - Simulation
    and Computation 24, 285-308), with training runs in the place of readers:

        seed_variance / seeds + example_variance.

    The first term holds what differs from run to run, the predictions of single examples included. The second term is
    what the choice of examples does to all runs alike. The first error is Student's with `seeds` - 1 degrees of
    freedom, the second is normal. The interval of their sum is Howe's (1974, Journal of the American Statistical
    Association 69, 789-794): the root of the sum of squares of the half widths of both.

    Attributes:
        estimate: difference of the means over tasks, as a share (0.01 is one point).
        seed_variance: variance of one run's difference; NaN when there is a single run.
        example_variance: covariance of the differences of two runs through the choice of test examples. Of a single
            run the variance through that choice.
        seeds: number of runs of each.
        looks: how often the runs are looked at, the last time included. Interval and p-value hold for all looks
            together (`level_at_each_of`).
        prior_degrees: what other comparisons say of `seed_variance`, in degrees of freedom
            (`benchmarks.statistics.moderated`).
    """

    estimate: float
    seed_variance: float
    example_variance: float
    seeds: int
    looks: int = 1
    prior_degrees: float = 0.0

    @property
    def degrees(self) -> int:
        """Degrees of freedom of the runs of this difference alone."""
        return self.seeds - 1

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval. Of a single run it covers the choice of examples only."""
        return float(self._half_width(level_at_each_of(self.looks)))

    @property
    def p_value(self) -> float:
        """Two-sided, of no difference: the level whose interval just reaches zero."""
        size = abs(self.estimate)
        if size == 0:
            return 1.0
        if size >= self._half_width(SMALLEST_P):
            return SMALLEST_P
        level = float(optimize.brentq(lambda level: float(self._half_width(level)) - size, SMALLEST_P, 1.0))
        return min(1.0, level * (1 - CONFIDENCE) / level_at_each_of(self.looks))

    def find_detectable(self, comparisons: int = 1, power: float = POWER) -> float:
        """The smallest true difference that as many runs of this spread would show with probability `power`.

        Shown means a p-value below 5 % / `comparisons`, the level at which Holm's procedure begins. Without
        `example_variance` it is the power of Student's t test (Cohen 1988, chapter 2). The spread counts as known: of
        three runs the measured one may be half the true one, or six times as large. NaN of a single run. What an
        earlier look may have shown counts for nothing.
        """
        if self.seeds < 2:
            return float("nan")
        # What the runs' variance may be measured as, in shares of the true one, all equally likely.
        measured = stats.chi2.ppf((np.arange(QUADRATURE) + 0.5) / QUADRATURE, self.degrees) / self.degrees
        limits = self._half_width(level_at_each_of(self.looks) / comparisons, measured)
        error = np.sqrt(self.seed_variance / self.seeds + self.example_variance)
        if error == 0:
            return 0.0

        def miss(size: float) -> float:
            return float(stats.norm.cdf((size - limits) / error).mean()) - power

        return float(optimize.brentq(miss, 0.0, float(limits.max()) + 10 * error))

    def _half_width(self, level: float, spread: ArrayLike = 1.0) -> NDArray[np.float64]:
        """Half of the interval that misses with probability `level`, at a multiple of the runs' variance."""
        of_examples = stats.norm.isf(level / 2) * np.sqrt(self.example_variance)
        if self.seeds < 2:
            return np.asarray(of_examples)
        of_seeds = stats.t.isf(level / 2, self.degrees + self.prior_degrees) * np.sqrt(
            self.seed_variance * np.asarray(spread) / self.seeds
        )
        half: NDArray[np.float64] = np.hypot(of_seeds, of_examples)
        return half


def mean_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Mean and half width of its Student t interval; the half width of a single value is NaN, for unknown."""
    sample = _finite(values)
    if len(sample) == 1:
        return float(sample[0]), float("nan")
    error = sample.std(ddof=1) / np.sqrt(len(sample))
    return float(sample.mean()), float(stats.t.ppf((1 + confidence) / 2, len(sample) - 1) * error)


def verdict(difference: Difference, adjusted_p: float, band: float = EQUIVALENCE_BAND) -> Verdict:
    """What a comparison says.

    ``equivalent`` when the whole 95 % interval lies within plus or minus `band`: a difference that is certain
    but too small to matter counts as none. Otherwise ``better`` or ``worse`` when the adjusted p-value is below
    5 %. All else is ``undecided``, and so is a single run, whose training noise nobody has seen.
    """
    if difference.seeds < 2:
        return "undecided"
    if abs(difference.estimate) + difference.half_width <= band:
        return "equivalent"
    if adjusted_p < 1 - CONFIDENCE:
        return "better" if difference.estimate > 0 else "worse"
    return "undecided"


def standard_error(score: float, rows: int, *, is_correlation: bool = False) -> float:
    """Standard error of a score from the number of test rows alone: binomial, or that of a correlation."""
    if is_correlation:
        return float((1 - score**2) / np.sqrt(max(rows - 1, 1)))
    return float(np.sqrt(score * (1 - score) / rows))


def _finite(values: ArrayLike | Sequence[float]) -> NDArray[np.float64]:
    sample = np.asarray(values, dtype=float).ravel()
    if len(sample) == 0 or not np.isfinite(sample).all():
        raise ValueError(f"expected one or more finite numbers, got {sample.tolist()}")
    return sample
