"""The metrics of GLUE as `evaluate.Metric` classes, computed by scikit-learn and SciPy, never downloaded.

The first figure of a metric is its primary one, the one averaged over tasks: accuracy for MRPC and QQP,
Pearson's correlation for STS-B. The GLUE leaderboard averages accuracy with F1 and Pearson with Spearman
instead; the papers on adapters print the first figure, so that is what is compared here, and the second is
always reported beside it.

Figures are fractions and correlations, not per cent. A figure that is undefined is ``None`` with a note that
says why; a degenerate input that still has a figure (one class predicted throughout, say) keeps it, with a
note.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as sklearn_metrics

from moepeft.errors import did_you_mean

Figures = dict[str, float | None]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class MetricResult:
    """The figures of one task.

    Attributes:
        values: figure by name, primary first; ``None`` where it is undefined.
        primary: name of the figure that is averaged over tasks.
        note: what a reader of the figures must know, ``None`` when there is nothing.
    """

    values: Figures
    primary: str
    note: str | None


class UnknownMetric(KeyError):
    """No metric of that name exists."""

    def __str__(self) -> str:
        # KeyError would print the message with quotes and escapes.
        return str(self.args[0])


class TaskMetric(evaluate.Metric):  # type: ignore[misc]
    """What the metrics share. They compute on complete and finite columns; `score` sees to that.

    Attributes:
        figures: names of the figures, primary first.
        value_type: type of predictions and references, class indices by default.
        reference: where the metric was defined.
        why_undefined: the note when a figure is ``None``.
    """

    figures: ClassVar[tuple[str, ...]]
    value_type: ClassVar[Literal["int64", "float64"]] = "int64"
    reference: ClassVar[str] = ""
    why_undefined: ClassVar[str | None] = None

    def _info(self) -> evaluate.MetricInfo:
        columns = {name: datasets.Value(self.value_type) for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation=self.reference,
            inputs_description="One prediction and one reference per row, in the same order.",
            features=datasets.Features(columns),
        )


class Matthews(TaskMetric):
    """Matthews' correlation of classes, in [-1, 1]; 0 when only one class is predicted or present (CoLA)."""

    figures = ("matthews",)
    reference = "Matthews 1975, Biochimica et Biophysica Acta 405(2); Gorodkin 2004 for more than two classes"

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> Figures:
        # With one and the same class in both, scikit-learn returns its 0 with a warning on another matter.
        if len({*predictions, *references}) == 1:
            return {"matthews": 0.0}
        return {"matthews": float(sklearn_metrics.matthews_corrcoef(references, predictions))}


class Accuracy(TaskMetric):
    """Fraction of right answers, in [0, 1]."""

    figures = ("accuracy",)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> Figures:
        return {"accuracy": float(sklearn_metrics.accuracy_score(references, predictions))}


class AccuracyF1(TaskMetric):
    """Accuracy, and F1 of class 1, both in [0, 1] (MRPC, QQP); F1 is undefined when class 1 never occurs."""

    figures = ("accuracy", "f1")
    why_undefined = "F1 undefined: class 1 is neither predicted nor present"

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> Figures:
        others = {*predictions, *references} - {0, 1}
        if others:
            raise ValueError(f"F1 wants the classes 0 and 1, got {sorted(others)} as well; use metric accuracy.")
        # F1 = 2 TP / (2 TP + FP + FN): 0 / 0 only when class 1 is neither predicted nor present.
        f1 = float(sklearn_metrics.f1_score(references, predictions, zero_division=np.nan))
        return {
            "accuracy": float(sklearn_metrics.accuracy_score(references, predictions)),
            "f1": None if math.isnan(f1) else f1,
        }


class PearsonSpearman(TaskMetric):
    """Linear and rank correlation of scores, in [-1, 1] (STS-B); undefined when one side is constant."""

    figures = ("pearson", "spearman")
    value_type = "float64"
    why_undefined = "correlation undefined: one side is constant, exactly or up to rounding"

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> Figures:
        undefined: Figures = dict.fromkeys(self.figures)
        if len(references) < 2:
            return undefined
        try:
            with warnings.catch_warnings():
                # Of values that differ by rounding alone, SciPy would correlate the rounding errors.
                warnings.simplefilter("error", stats.ConstantInputWarning)
                warnings.simplefilter("error", stats.NearConstantInputWarning)
                pearson = stats.pearsonr(predictions, references).statistic
                spearman = stats.spearmanr(predictions, references).statistic
        except (stats.ConstantInputWarning, stats.NearConstantInputWarning):
            return undefined
        return {"pearson": float(pearson), "spearman": float(spearman)}


METRICS: Mapping[str, type[TaskMetric]] = {
    "matthews": Matthews,
    "accuracy": Accuracy,
    "accuracy_f1": AccuracyF1,
    "pearson_spearman": PearsonSpearman,
}


def score(metric: str, predictions: Sequence[float], references: Sequence[float]) -> MetricResult:
    """Scores the predictions of one task.

    Args:
        metric: a key of `METRICS`.
        predictions: class indices, or scores; NaN and infinity leave every figure undefined.
        references: the true class indices or scores, in the same order.

    Raises:
        UnknownMetric: no such metric.
        ValueError: lengths differ or are 0, a reference is not finite, or a class is no integer.
    """
    if metric not in METRICS:
        raise UnknownMetric(f"No metric is called {metric!r}.{did_you_mean(metric, METRICS)}")
    kind = METRICS[metric]
    guesses, truths = _column("predictions", predictions), _column("references", references)
    _check(guesses, truths)
    primary = kind.figures[0]
    lost = int(np.count_nonzero(~np.isfinite(guesses)))
    if lost:
        undefined: Figures = dict.fromkeys(kind.figures)
        return MetricResult(undefined, primary, f"{lost} of {len(guesses)} predictions are not finite")
    if kind.value_type == "int64":
        _check_classes("predictions", guesses)
        _check_classes("references", truths)
    values = _compute(kind, guesses, truths)
    return MetricResult(values, primary, _note(kind, values, guesses, truths))


def _compute(kind: type[TaskMetric], predictions: Values, references: Values) -> Figures:
    # The library makes a cache folder even for a metric kept in memory: give it one that goes away again.
    with tempfile.TemporaryDirectory(prefix="moepeft-metric-") as folder:
        figures: Figures = kind(keep_in_memory=True, cache_dir=folder).compute(
            predictions=predictions.astype(kind.value_type), references=references.astype(kind.value_type)
        )
    return figures


def _column(name: str, values: Sequence[float]) -> Values:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise ValueError(f"{name} have the shape {column.shape}, wanted one number per row.")
    return column


def _check(predictions: Values, references: Values) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"Got {len(predictions)} predictions for {len(references)} references; wanted one for each.")
    if not len(references):
        raise ValueError("Got 0 predictions and 0 references; wanted at least one row to score.")
    bad = np.flatnonzero(~np.isfinite(references))
    if len(bad):
        raise ValueError(f"{len(bad)} of {len(references)} references are not finite (first: row {bad[0]}); fix them.")


def _check_classes(name: str, values: Values) -> None:
    # Above 2^53 doubles are no longer exact integers, and no class index is that large.
    bad = np.flatnonzero((values != np.rint(values)) | (np.abs(values) > 2**53))
    if len(bad):
        raise ValueError(f"{name} hold {values[bad[0]]:g} at row {bad[0]}; wanted class indices, as from an arg-max.")


def _note(kind: type[TaskMetric], values: Figures, predictions: Values, references: Values) -> str | None:
    remarks: list[str] = []
    if _is_constant(predictions):
        remarks.append("constant predictions")
    if _is_constant(references):
        remarks.append("single-class references" if kind.value_type == "int64" else "constant references")
    if kind.why_undefined and None in values.values():
        remarks.append(kind.why_undefined)
    return "; ".join(remarks) or None


def _is_constant(values: Values) -> bool:
    return bool((values == values[0]).all())
