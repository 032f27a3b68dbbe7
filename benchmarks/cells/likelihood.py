"""What probabilities are worth: the negative log-likelihood of what is true, beside that of a prior.

With p the model's probabilities, y what is true, and a mean over the scored rows of a task:

    NLL         = - mean log p(y)
    NLL(prior)  = - mean log q(y),  q from the labels of the training rows alone
    skill       = 1 - NLL / NLL(prior)

* Classes and choices: p is the softmax over the candidates. q is their frequency among the training rows, each counted
  once more than it occurs, so that none is impossible; of a row with fewer choices, among those that it has.
* Scores: a model that gives a number m is read as the normal density of mean m and variance v. v is the mean squared
  error on the scored rows, the value that makes them most likely, and one for all rows of a task: a model is neither
  paid nor punished for a spread that it never states. q has mean and variance of the training scores. Scores count in
  standard deviations of the training scores: a density, and with it the skill, would depend on the scale otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.cells.data import TokenisedTask
from benchmarks.records.schema import Likelihood

BINS = 10
# A root mean squared error below this share of the range counts as this: the density of an exact answer has no bound.
SMALLEST_ERROR = 1e-3

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RowLikelihoods:
    """What was said of every scored row of a task.

    Attributes:
        log_likelihood: log p(y), of shape (rows,).
        prior: log q(y).
        confidence: p of the answer that was chosen; NaN for scores.
    """

    log_likelihood: Floats
    prior: Floats
    confidence: Floats

    def summary(self, correct: Floats) -> Likelihood:
        """Means over the rows; `correct` is 1 or 0 by row, NaN for scores."""
        return Likelihood(
            nll=-float(self.log_likelihood.mean()),
            prior_nll=-float(self.prior.mean()),
            calibration_error=None if np.isnan(correct).any() else calibration_error(self.confidence, correct),
        )


def of_candidates(task: TokenisedTask, log_probabilities: Floats, chosen: Floats) -> RowLikelihoods:
    """Of classes or choices, whose log-probabilities have the shape (rows, candidates)."""
    rows, truth = np.arange(len(chosen)), np.array([int(row.label) for row in task.validation])
    confidence = np.exp(log_probabilities[rows, chosen.astype(int)])
    return RowLikelihoods(log_probabilities[rows, truth], prior(task), confidence)


def of_scores(task: TokenisedTask, predictions: Floats) -> RowLikelihoods:
    """Of numbers, by the normal density around each."""
    unit, smallest = _unit(task)
    errors = (np.array([row.label for row in task.validation]) - predictions) / unit
    spread = max(smallest, float(np.sqrt(np.square(errors).mean())))
    return RowLikelihoods(_log_normal(errors, spread), prior(task), np.full(len(errors), np.nan))


def of_prior(task: TokenisedTask, chosen: Floats) -> RowLikelihoods:
    """Of the guess that knows the training labels alone: a skill of exactly 0."""
    known = prior(task)
    if task.spec.kind == "regression":
        return RowLikelihoods(known, known, np.full(len(known), np.nan))
    counts = Counter(int(row.label) for row in task.train)
    rows = zip(task.validation, chosen, strict=True)
    confidence = np.exp([_log_share(counts, int(guess), task.candidates(row)) for row, guess in rows])
    return RowLikelihoods(known, known, confidence)


def prior(task: TokenisedTask) -> Floats:
    """log q(y) of every scored row."""
    if task.spec.kind == "regression":
        labels = np.array([row.label for row in task.validation])
        return _log_normal((labels - np.mean([row.label for row in task.train])) / _unit(task)[0], 1.0)
    counts = Counter(int(row.label) for row in task.train)
    return np.array([_log_share(counts, int(row.label), task.candidates(row)) for row in task.validation])


def calibration_error(confidence: Floats, correct: Floats) -> float:
    """Expected calibration error: the difference of confidence and accuracy, over ten bins of equal width.

    Naeini, Cooper and Hauskrecht 2015, AAAI; Guo et al. 2017, arXiv 1706.04599.
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - correct, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def _log_share(counts: Mapping[int, int], answer: int, candidates: int) -> float:
    """log q of an answer; of one that the row lacks minus infinity."""
    if answer >= candidates:
        return -np.inf
    return float(np.log((counts[answer] + 1) / sum(counts[other] + 1 for other in range(candidates))))


def _unit(task: TokenisedTask) -> tuple[float, float]:
    """The standard deviation of the training scores, and the smallest error that counts, in that unit."""
    low, high = task.spec.score_range
    smallest = SMALLEST_ERROR * (high - low)
    unit = max(smallest, float(np.std([row.label for row in task.train])))
    return unit, smallest / unit


def _log_normal(errors: Floats, spread: float) -> Floats:
    density: Floats = stats.norm.logpdf(errors, 0, spread)
    return density
