"""The metrics, held to scikit-learn, SciPy, NumPy and arithmetic done by hand."""

from __future__ import annotations

import math
import socket
import tempfile
from pathlib import Path

import evaluate
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from benchmarks.tasks.metrics import METRICS, MetricResult, UnknownMetric, score

NAN, INF = math.nan, math.inf


def _classes(seed: int, count: int) -> tuple[list[int], list[int]]:
    """Predictions that agree with the references in about two thirds of the rows."""
    random = np.random.default_rng(seed)
    references = random.integers(0, count, size=211)
    predictions = np.where(random.random(211) < 0.5, references, random.integers(0, count, size=211))
    return predictions.tolist(), references.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_figures_of_classes_are_those_of_scikit_learn(seed: int) -> None:
    predictions, references = _classes(seed, 2)
    assert score("matthews", predictions, references) == MetricResult(
        {"matthews": sk.matthews_corrcoef(references, predictions)}, "matthews", None
    )
    # For two classes Matthews' correlation is Pearson's, which NumPy computes by another road.
    assert score("matthews", predictions, references).values["matthews"] == pytest.approx(
        np.corrcoef(predictions, references)[0, 1], abs=1e-12
    )
    assert score("accuracy_f1", predictions, references) == MetricResult(
        {
            "accuracy": float(np.mean(np.equal(predictions, references))),
            "f1": sk.f1_score(references, predictions),
        },
        "accuracy",
        None,
    )


@pytest.mark.parametrize("count", [3, 5])
def test_more_than_two_classes(count: int) -> None:
    predictions, references = _classes(7, count)
    expected = sk.matthews_corrcoef(references, predictions)
    assert score("matthews", predictions, references).values == {"matthews": expected}
    assert score("accuracy", predictions, references).values == {"accuracy": sk.accuracy_score(references, predictions)}


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_those_of_scipy(seed: int) -> None:
    random = np.random.default_rng(seed)
    references = random.integers(0, 26, size=157) / 5  # ties, as in STS-B
    predictions = references + random.normal(size=157)
    result = score("pearson_spearman", predictions, references)
    assert result.primary == "pearson"
    assert list(result.values) == ["pearson", "spearman"]
    assert result.note is None
    assert result.values["pearson"] == pytest.approx(np.corrcoef(predictions, references)[0, 1], abs=1e-12)
    ranks = np.corrcoef(stats.rankdata(predictions), stats.rankdata(references))[0, 1]
    assert result.values["spearman"] == pytest.approx(ranks, abs=1e-12)


def test_two_by_two_table_by_hand() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    predictions = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    references = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    both = score("accuracy_f1", predictions, references).values
    assert both["accuracy"] == pytest.approx((3 + 4) / 10)
    assert both["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = (12 - 2) / sqrt(4 * 5 * 5 * 6) = 10 / sqrt(600)
    matthews = score("matthews", predictions, references).values["matthews"]
    assert matthews == pytest.approx(10 / math.sqrt(600))


def test_predictions_and_references_are_not_swapped() -> None:
    # Accuracy, F1, Matthews and both correlations are symmetric; the notes are not.
    assert score("accuracy", [1, 1], [0, 1]).note == "constant predictions"
    assert score("accuracy", [0, 1], [1, 1]).note == "single-class references"


def test_majority_class_of_mrpc_by_hand() -> None:
    # 279 of 408 validation pairs are equivalent: accuracy 279/408, F1 = 2*279 / (2*279 + 129 + 0).
    result = score("accuracy_f1", [1] * 408, [1] * 279 + [0] * 129)
    assert result.values == {"accuracy": pytest.approx(279 / 408), "f1": pytest.approx(558 / 687)}
    assert result.note == "constant predictions"


def test_correlations_by_hand() -> None:
    # Deviations (-1, 0, 1) and (-4/3, -1/3, 5/3): 3 / sqrt(2 * 42/9), while the order agrees completely.
    result = score("pearson_spearman", [1, 2, 3], [0, 1, 3])
    assert result.values == {"pearson": pytest.approx(3 / math.sqrt(2 * 42 / 9)), "spearman": 1.0}


@pytest.mark.parametrize(
    ("metric", "perfect"),
    [
        ("matthews", {"matthews": 1.0}),
        ("accuracy", {"accuracy": 1.0}),
        ("accuracy_f1", {"accuracy": 1.0, "f1": 1.0}),
        ("pearson_spearman", {"pearson": 1.0, "spearman": 1.0}),
    ],
)
def test_perfect_and_reversed_predictions(metric: str, perfect: dict[str, float]) -> None:
    right, wrong = [0, 1, 1, 0], [1, 0, 0, 1]
    assert score(metric, right, right).values == pytest.approx(perfect)
    lowest = -1.0 if "accuracy" not in metric else 0.0
    assert score(metric, wrong, right).values == pytest.approx(dict.fromkeys(perfect, lowest))


@pytest.mark.parametrize("references", [[0, 1, 1], [1, 1, 1], [0, 0, 0]])
def test_matthews_of_constant_predictions_is_zero_with_a_note(references: list[int]) -> None:
    result = score("matthews", [1, 1, 1], references)
    assert result.values == {"matthews": 0.0}
    assert result.note is not None
    assert result.note.startswith("constant predictions")
    assert ("single-class references" in result.note) == (len(set(references)) == 1)


def test_f1_is_undefined_only_without_any_positive() -> None:
    nothing = score("accuracy_f1", [0, 0], [0, 0])
    assert nothing.values == {"accuracy": 1.0, "f1": None}
    assert "F1 undefined: class 1 is neither predicted nor present" in (nothing.note or "")
    # Present but never predicted, and predicted but never present: no true positive, F1 is 0.
    assert score("accuracy_f1", [0, 0], [0, 1]).values == {"accuracy": 0.5, "f1": 0.0}
    assert score("accuracy_f1", [0, 1], [0, 0]).values == {"accuracy": 0.5, "f1": 0.0}


@pytest.mark.parametrize(
    ("predictions", "references", "note"),
    [
        ([2.5, 2.5, 2.5], [0.0, 1.0, 5.0], "constant predictions"),
        ([0.0, 1.0, 5.0], [2.5, 2.5, 2.5], "constant references"),
        ([1.0, 1.0 + 2.3e-16, 1.0 + 4.5e-16], [0.0, 1.0, 5.0], "up to rounding"),
        ([1.0], [1.0], "constant predictions"),
    ],
)
def test_correlation_with_a_constant_is_undefined(predictions: list[float], references: list[float], note: str) -> None:
    result = score("pearson_spearman", predictions, references)
    assert result.values == {"pearson": None, "spearman": None}
    assert result.note is not None
    assert note in result.note
    assert "correlation undefined" in result.note


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_predictions_that_are_not_finite_leave_every_figure_undefined(metric: str, bad: float) -> None:
    result = score(metric, [0, bad, 1, bad], [0, 1, 1, 0])
    assert result.values == dict.fromkeys(METRICS[metric].figures)
    assert result.primary == METRICS[metric].figures[0]
    assert result.note == "2 of 4 predictions are not finite"


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "message"),
    [
        ("accuracy", [1, 0, 1], [1, 0], "3 predictions for 2 references"),
        ("accuracy", [], [], "0 predictions and 0 references"),
        ("accuracy", [0.5, 1], [0, 1], r"predictions hold 0\.5 at row 0"),
        ("accuracy", [0, 1], [0, 1.5], r"references hold 1\.5 at row 1"),
        ("accuracy", [0, 1e300], [0, 1], r"predictions hold 1e\+300 at row 1"),
        ("accuracy", [[0.1, 0.9]], [1], r"predictions have the shape \(1, 2\)"),
        ("pearson_spearman", [1, 2], [NAN, 2], r"1 of 2 references are not finite \(first: row 0\)"),
        ("accuracy_f1", [0, 2], [0, 1], r"classes 0 and 1, got \[2\]"),
    ],
)
def test_unusable_input_is_refused(
    metric: str, predictions: list[float], references: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score(metric, predictions, references)


def test_unknown_metric_suggests_a_close_one() -> None:
    with pytest.raises(UnknownMetric, match=r"'mathews'. Did you mean matthews\? Available: accuracy"):
        score("mathews", [1], [1])


def test_arrays_of_other_types_are_accepted() -> None:
    predictions = np.array([True, False, True])
    references = np.array([1, 0, 0], dtype=np.int8)
    assert score("accuracy", predictions, references).values == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize("metric", METRICS)
def test_the_classes_are_metrics_of_the_library(metric: str, tmp_path: Path) -> None:
    instance = METRICS[metric](keep_in_memory=True, cache_dir=str(tmp_path))
    assert isinstance(instance, evaluate.Metric)
    assert instance.description == METRICS[metric].__doc__
    # The library's own way: in batches.
    for predictions, references in (([0, 1], [0, 1]), ([1, 0], [0, 1])):
        instance.add_batch(predictions=predictions, references=references)
    expected = score(metric, [0, 1, 1, 0], [0, 1, 0, 1]).values
    assert instance.compute() == expected


def test_scoring_needs_no_network_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a metric tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    for metric in METRICS:
        score(metric, [0, 1, 1], [0, 1, 0])
    assert list(tmp_path.iterdir()) == []
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
