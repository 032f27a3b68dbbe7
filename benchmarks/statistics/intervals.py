"""Intervals, adjusted tests, verdicts, ranks. Small samples are the rule here: three to five runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

CONFIDENCE = 0.95
EQUIVALENCE_BAND = 0.005
"""Differences of half a point either way count as none, unless a protocol declares another band."""

MAX_SEEDS = 1000
SMALLEST_P = 1e-12

Verdict = Literal["better", "worse", "equivalent", "undecided"]


@dataclass(frozen=True, slots=True)
class Difference:
    """How much a method scores above a reference, and what is known of its error.

    Attributes:
        estimate: difference of the means over tasks, as a share (0.01 is one point).
        seed_variance: variance of one run's difference; NaN when there is a single run.
        example_variance: variance of `estimate` from the choice of test examples; more runs do not shrink it.
        seeds: number of runs of each.
    """

    estimate: float
    seed_variance: float
    example_variance: float
    seeds: int

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval. Of a single run it covers the choice of examples only."""
        return self.half_width_at(1 - CONFIDENCE)

    @property
    def p_value(self) -> float:
        """Two-sided, of no difference: the level whose interval just reaches zero."""
        size = abs(self.estimate)
        if size == 0:
            return 1.0
        if size >= self.half_width_at(SMALLEST_P):
            return SMALLEST_P
        return float(optimize.brentq(lambda level: self.half_width_at(level) - size, SMALLEST_P, 1.0))

    def half_width_at(self, level: float) -> float:
        """Half of the interval that misses with probability `level`."""
        of_examples = _half_width_of_examples(self.example_variance, level)
        of_seeds = 0.0 if self.seeds < 2 else _half_width_of_seeds(self.seed_variance, np.array(self.seeds), level)
        return float(np.hypot(of_seeds, of_examples))


# Root of the sum of squares of two intervals. One t quantile for the sum of both variances, with Satterthwaite's
# degrees of freedom, covers too rarely: where three runs agree by chance, it takes their part for small and the
# degrees of freedom for many.


def _half_width_of_examples(variance: float, level: float) -> float:
    return float(stats.norm.isf(level / 2) * np.sqrt(variance))


def _half_width_of_seeds(variance: float, seeds: NDArray[np.int64], level: float) -> NDArray[np.float64]:
    """Student's, of the mean over so many runs."""
    half: NDArray[np.float64] = stats.t.isf(level / 2, seeds - 1) * np.sqrt(variance / seeds)
    return half


def mean_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Mean and half width of its Student t interval; the half width of a single value is NaN, for unknown."""
    sample = _finite(values)
    if len(sample) == 1:
        return float(sample[0]), float("nan")
    error = sample.std(ddof=1) / np.sqrt(len(sample))
    return float(sample.mean()), float(stats.t.ppf((1 + confidence) / 2, len(sample) - 1) * error)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjustment: compare with the level itself, whatever the number of comparisons."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


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


def seeds_to_settle(difference: Difference, band: float = EQUIVALENCE_BAND, comparisons: int = 1) -> int | None:
    """The number of runs at which an undecided difference would get another verdict, all else as measured.

    Args:
        difference: as measured.
        band: of equivalence.
        comparisons: in the table; the p-value must survive Holm's adjustment wherever it ranks among them.

    Returns:
        None when it is unknown (a single run), or when the test examples are too few for any number of runs.
    """
    if difference.seeds < 2:
        return None
    size, seeds = abs(difference.estimate), np.arange(2, MAX_SEEDS + 1)
    needed, usual = (
        np.hypot(
            _half_width_of_seeds(difference.seed_variance, seeds, level),
            _half_width_of_examples(difference.example_variance, level),
        )
        for level in ((1 - CONFIDENCE) / comparisons, 1 - CONFIDENCE)
    )
    settled = seeds[(needed < size) | (size + usual <= band)]
    return int(settled[0]) if len(settled) else None


def average_ranks(scores: ArrayLike) -> NDArray[np.float64]:
    """Mean rank of every method, 1 is best, ties share; a missing score (NaN) ranks last.

    Args:
        scores: shape (tasks, methods), more is better.
    """
    table = _rank_table(scores)
    mean: NDArray[np.float64] = table.mean(axis=0)
    return mean


def friedman(scores: ArrayLike) -> float:
    """P-value of the hypothesis that all methods rank alike, from scores of shape (tasks, methods)."""
    table = _rank_table(scores)
    if table.shape[1] < 3:
        raise ValueError(f"Friedman's test compares at least 3 methods, got {table.shape[1]}")
    if (table == table[:, :1]).all():
        return 1.0  # All tied everywhere: scipy would divide zero by zero.
    return float(stats.friedmanchisquare(*table.T).pvalue)


def nemenyi_distance(methods: int, tasks: int, alpha: float = 1 - CONFIDENCE) -> float:
    """Critical difference of mean ranks (Demsar 2006, equation 2)."""
    if methods < 2 or tasks < 2:
        raise ValueError(f"ranks need at least 2 methods and 2 tasks, got {methods} and {tasks}")
    q = stats.studentized_range.ppf(1 - alpha, methods, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(methods * (methods + 1) / (6 * tasks)))


def standard_error(score: float, rows: int, *, is_correlation: bool = False) -> float:
    """Standard error of a score from the number of test rows alone: binomial, or that of a correlation."""
    if is_correlation:
        return float((1 - score**2) / np.sqrt(max(rows - 1, 1)))
    return float(np.sqrt(score * (1 - score) / rows))


def _rank_table(scores: ArrayLike) -> NDArray[np.float64]:
    table = np.nan_to_num(np.asarray(scores, dtype=float), nan=-np.inf, neginf=-np.inf)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"expected scores of shape (tasks, methods), got {table.shape}")
    ranks: NDArray[np.float64] = stats.rankdata(-table, axis=1)
    return ranks


def _finite(values: ArrayLike | Sequence[float]) -> NDArray[np.float64]:
    sample = np.asarray(values, dtype=float).ravel()
    if len(sample) == 0 or not np.isfinite(sample).all():
        raise ValueError(f"expected one or more finite numbers, got {sample.tolist()}")
    return sample
