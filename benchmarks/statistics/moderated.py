"""Variances of few runs that learn from each other, by empirical Bayes.

After Smyth (2004, Statistical Applications in Genetics and Molecular Biology 3, article 3).

A variance s^2 of d degrees of freedom is taken as sigma^2 chi^2_d / d, and the sigma^2 of all comparisons as drawn from
s0^2 d0 / chi^2_d0. Both constants are fitted to the logarithms of all variances by their mean and variance. What is
known of sigma^2 then is

    (d0 s0^2 + d s^2) / (d0 + d)        of d0 + d degrees of freedom.

With five runs d is 4: a share of the error of every verdict is that four numbers do not say how much runs spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from benchmarks.statistics.intervals import Difference

FEWEST = 3
"""Comparisons of which something can be learnt about how variances differ."""
# A variance is taken to be no smaller than this share of the median: the logarithm of zero would outweigh all others.
_SMALLEST_SHARE = 1e-5


class Prior(NamedTuple):
    """What all variances have in common.

    Attributes:
        degrees: d0; infinite where the variances differ no more than by chance.
        variance: s0^2.
    """

    degrees: float
    variance: float


def fit_prior(variances: ArrayLike, degrees: ArrayLike) -> Prior:
    """The prior of these variances.

    Args:
        variances: of the comparisons, shape (comparisons,), one of them above zero.
        degrees: degrees of freedom of each, or of all.
    """
    sample, half = np.asarray(variances, float), np.asarray(degrees, float) / 2
    sample = np.maximum(sample, _SMALLEST_SHARE * np.median(sample))
    half = np.broadcast_to(half, sample.shape)
    logs = np.log(sample) - special.digamma(half) + np.log(half)
    beyond_chance = logs.var(ddof=1) - special.polygamma(1, half).mean()
    if beyond_chance <= 0:
        return Prior(np.inf, float(sample.mean()))
    half_of_prior = _inverse_trigamma(float(beyond_chance))
    spread = np.exp(logs.mean() + special.digamma(half_of_prior) - np.log(half_of_prior))
    return Prior(2 * half_of_prior, float(spread))


def moderate(variances: ArrayLike, degrees: ArrayLike, prior: Prior) -> NDArray[np.float64]:
    """The variances with what all have in common, shape (comparisons,)."""
    sample, own = np.asarray(variances, float), np.asarray(degrees, float)
    if np.isinf(prior.degrees):
        return np.full(sample.shape, prior.variance)
    moderated: NDArray[np.float64] = (prior.degrees * prior.variance + own * sample) / (prior.degrees + own)
    return moderated


def moderate_all(differences: Sequence[Difference]) -> list[Difference] | None:
    """The differences with moderated variances of runs; None of few, of single or of equal runs."""
    variances, degrees = ([each.seed_variance for each in differences], [each.degrees for each in differences])
    if len(differences) < FEWEST or min(degrees) < 1 or np.median(variances) == 0:
        return None
    prior = fit_prior(variances, degrees)
    return [
        replace(each, seed_variance=float(variance), prior_degrees=prior.degrees)
        for each, variance in zip(differences, moderate(variances, degrees, prior), strict=True)
    ]


def _inverse_trigamma(value: float) -> float:
    """Where the trigamma function has this value: it falls, and lies between 1 / x and 1 / x + 1 / x^2."""
    low, high = 1 / value, (1 + np.sqrt(1 + 4 * value)) / (2 * value)
    root = optimize.brentq(lambda x: special.polygamma(1, x) - value, 0.5 * low, 2 * high, xtol=1e-14, rtol=1e-12)
    return float(root)
