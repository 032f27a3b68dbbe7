"""The error of a difference of scores, from what both methods predicted for every test example.

Runs of the same seed saw the same data in the same order, and all runs are tested on the same examples, so methods are
compared pair by pair. Two sources of chance are kept apart:

* the runs: a seed is one training run that yields all tasks, so its differences are averaged over tasks first and
  their variance is taken over seeds, with n - 1. That variance holds what examples do to one run alone.
* the test examples: resampled within every task, the same draw for both methods and all runs. The covariance of two
  runs over these draws is what the choice of examples does to all runs alike; more runs do not average it away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.statistics.intervals import Difference

REPLICATES = 1000
_CHUNK_NUMBERS = 4_000_000  # 32 MB of resampling weights at a time

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PairedTask:
    """Predictions of two methods on one task.

    Attributes:
        metric: name of the figure to compare, one of `STATISTICS`.
        labels: shape (examples,); of ``skill`` the prior's log-likelihoods of what is true.
        method: predictions of the method, shape (seeds, examples); of ``skill`` its own log-likelihoods.
        reference: those of the reference, by the same seeds.
    """

    metric: str
    labels: Floats
    method: Floats
    reference: Floats

    def __post_init__(self) -> None:
        """Refuse what cannot be paired."""
        shape = (len(self.method), len(self.labels))
        if self.method.shape != shape or self.reference.shape != shape or 0 in shape:
            raise ValueError(
                f"labels of shape {self.labels.shape} need predictions of shape (seeds, examples) from both methods, "
                f"got {self.method.shape} and {self.reference.shape}"
            )
        if self.metric not in STATISTICS:
            raise ValueError(f"cannot resample the metric {self.metric!r}: give {', '.join(STATISTICS)}")


@dataclass(frozen=True, slots=True)
class Statistic:
    """A metric as a function of sums over examples, so that a resample is a weighted sum.

    Attributes:
        terms: (labels, predictions of shape (runs, examples)) -> what is summed, shape (runs, examples, terms).
        value: sums of shape (..., terms) -> the metric.
    """

    terms: Callable[[Floats, Floats], Floats]
    value: Callable[[Floats], Floats]


def paired_difference(
    tasks: Sequence[PairedTask], *, looks: int = 1, replicates: int = REPLICATES, seed: int = 0
) -> Difference:
    """Difference of the mean over `tasks`, with its variances by runs and examples; `looks` is `Difference.looks`."""
    if len({len(task.method) for task in tasks}) != 1:
        raise ValueError(f"expected the same number of seeds in every task, got {[len(task.method) for task in tasks]}")
    observed = np.array([_differences(task, np.ones((1, len(task.labels))))[0] for task in tasks])
    per_seed = observed.mean(axis=0)
    streams = np.random.default_rng(seed).spawn(len(tasks))
    # Tasks have examples of their own, so that the variances of a mean over tasks add up.
    covariances = sum(
        _example_covariances(task, replicates, stream) for task, stream in zip(tasks, streams, strict=True)
    )
    return Difference(
        estimate=float(per_seed.mean()),
        seed_variance=float(per_seed.var(ddof=1)) if len(per_seed) > 1 else float("nan"),
        example_variance=_find_common(np.asarray(covariances)) / len(tasks) ** 2,
        seeds=len(per_seed),
        looks=looks,
    )


def _find_common(covariances: Floats) -> float:
    """Mean covariance of two runs, never negative; of a single run its variance."""
    seeds = len(covariances)
    if seeds == 1:
        return float(covariances[0, 0])
    return max(0.0, float(covariances.sum() - np.trace(covariances)) / (seeds * (seeds - 1)))


def metric_value(metric: str, labels: Floats, predictions: Floats) -> float:
    """The metric as resampling sees it; equal to the recorded score when the outcomes belong to the record."""
    statistic = STATISTICS[metric]
    return float(statistic.value(statistic.terms(labels, predictions[None]).sum(axis=1))[0])


def _example_covariances(task: PairedTask, replicates: int, stream: np.random.Generator) -> Floats:
    """Covariances (seeds, seeds) of the runs' differences when the examples are drawn again."""
    examples = len(task.labels)
    chunk = max(1, min(replicates, _CHUNK_NUMBERS // examples))
    resampled = []
    for start in range(0, replicates, chunk):
        rows = min(chunk, replicates - start)
        drawn = stream.integers(examples, size=(rows, examples)) + examples * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * examples).reshape(rows, examples)
        resampled.append(_differences(task, weights.astype(float)))
    covariances: Floats = np.atleast_2d(np.cov(np.concatenate(resampled), rowvar=False))
    return covariances


def _differences(task: PairedTask, weights: Floats) -> Floats:
    """Method minus reference under example weights of shape (replicates, examples): (replicates, seeds)."""
    statistic = STATISTICS[task.metric]
    terms = statistic.terms(task.labels, np.concatenate([task.method, task.reference]))
    runs, examples, width = terms.shape
    sums = weights @ terms.transpose(1, 0, 2).reshape(examples, runs * width)
    values = statistic.value(sums.reshape(len(weights), runs, width))
    half = runs // 2
    difference: Floats = values[:, :half] - values[:, half:]
    return difference


def _accuracy_terms(labels: Floats, predictions: Floats) -> Floats:
    right = (predictions == labels).astype(float)
    return np.stack([right, np.ones_like(right)], axis=-1)


def _accuracy(sums: Floats) -> Floats:
    value: Floats = sums[..., 0] / sums[..., 1]
    return value


def _f1_terms(labels: Floats, predictions: Floats) -> Floats:
    positive, predicted = np.broadcast_to(labels == 1, predictions.shape), predictions == 1
    terms: Floats = np.stack([positive & predicted, positive, predicted], axis=-1).astype(float)
    return terms


def _f1(sums: Floats) -> Floats:
    return _ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def _confusion_terms(labels: Floats, predictions: Floats) -> Floats:
    classes = np.unique(np.concatenate([labels, predictions.ravel()]))
    is_label = labels[:, None] == classes
    is_predicted = predictions[..., None] == classes
    cells = is_label[None, :, :, None] & is_predicted[:, :, None, :]
    terms: Floats = cells.reshape(*predictions.shape, -1).astype(float)
    return terms


def _matthews(sums: Floats) -> Floats:
    side = round(sums.shape[-1] ** 0.5)
    confusion = sums.reshape(*sums.shape[:-1], side, side)
    total = confusion.sum((-1, -2))
    right = np.trace(confusion, axis1=-2, axis2=-1)
    labels, predicted = confusion.sum(-1), confusion.sum(-2)
    spread = (total**2 - (labels**2).sum(-1)) * (total**2 - (predicted**2).sum(-1))
    return _ratio(right * total - (labels * predicted).sum(-1), np.sqrt(spread))


def _moment_terms(labels: Floats, predictions: Floats) -> Floats:
    # Centred first: sums of squares of values far from zero would lose the digits that matter.
    x = np.broadcast_to(labels - labels.mean(), predictions.shape)
    y = predictions - predictions.mean(axis=1, keepdims=True)
    terms: Floats = np.stack([np.ones_like(y), x, y, x * x, y * y, x * y], axis=-1)
    return terms


def _pearson(sums: Floats) -> Floats:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0)
    return _ratio(n * xy - x * y, np.sqrt(spread))


def _likelihood_terms(prior: Floats, likelihoods: Floats) -> Floats:
    return np.stack([likelihoods, np.broadcast_to(prior, likelihoods.shape)], axis=-1)


def _skill(sums: Floats) -> Floats:
    value: Floats = 1 - sums[..., 0] / sums[..., 1]
    return value


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Zero where it is undefined: a resample of one class only, as scikit-learn's Matthews has it."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


STATISTICS = {
    "accuracy": Statistic(_accuracy_terms, _accuracy),
    "f1": Statistic(_f1_terms, _f1),
    "matthews": Statistic(_confusion_terms, _matthews),
    "pearson": Statistic(_moment_terms, _pearson),
    "skill": Statistic(_likelihood_terms, _skill),
}
