"""Likelihoods, skills and calibration: held to scikit-learn and SciPy, and to what a prior must give."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.metrics import log_loss

from benchmarks.backbones.load import find_backbone, hidden_size, load_backbone, load_tokenizer
from benchmarks.cells.data import TokenisedTask
from benchmarks.cells.evaluate import evaluate_majority, evaluate_model
from benchmarks.cells.likelihood import calibration_error, of_scores
from benchmarks.families import family_of
from benchmarks.families.batch import HeadRow
from benchmarks.families.encoder import MultiTaskModel, collate
from benchmarks.protocols.protocol import Protocol
from benchmarks.records.schema import Likelihood
from benchmarks.reporting.comparison import comparison_table
from benchmarks.reporting.endpoint import Endpoint
from benchmarks.reporting.skill import skill_tables
from benchmarks.tasks.base import TaskSpec
from tests.support.record_factory import make_record
from tests.support.tables import frame_of

CLASSES = TaskSpec("classes", "classification", ("a", "b", "c"), "accuracy")
SCORES = TaskSpec("scores", "regression", (), "pearson_spearman", label_range=(0.0, 5.0))
CHOICES = TaskSpec("choices", "multiple_choice", (), "accuracy")


def head_rows(labels: list[float], choices: list[int]) -> tuple[HeadRow, ...]:
    draw = np.random.default_rng(len(labels)).integers(5, 60, size=(len(labels), 4, 6)).tolist()
    return tuple(
        HeadRow(sequences=tuple(map(tuple, ids[:number])), segments=((0,) * 6,) * number, label=label, index=at)
        for at, (ids, label, number) in enumerate(zip(draw, labels, choices, strict=True))
    )


@pytest.fixture(scope="module")
def tasks() -> tuple[TokenisedTask, ...]:
    classes = head_rows([0, 1, 2, 1, 1, 0], [1] * 6)
    scores = head_rows([0.5, 4.0, 2.5, 3.0], [1] * 4)
    choices = head_rows([0, 2, 1, 3, 1], [2, 3, 4, 4, 2])
    named = zip((CLASSES, SCORES, CHOICES), (classes, scores, choices), strict=True)
    return tuple(TokenisedTask(spec, rows, rows) for spec, rows in named)


def columns(outcomes: pd.DataFrame, task: str) -> dict[str, np.ndarray]:
    return {name: values.to_numpy() for name, values in outcomes[outcomes["task"] == task].items()}


def test_likelihoods_are_those_of_the_models_own_probabilities(tasks):
    specs = (CLASSES, SCORES, CHOICES)
    encoder = load_backbone(find_backbone("tiny-bert"), "encoder", dropout=0.0)
    model = MultiTaskModel(encoder, specs, hidden=hidden_size(encoder), stream=("t", 0, "heads")).eval()
    protocol = Protocol(name="t", tasks=("classes", "scores", "choices"), steps=1)
    family = family_of(protocol, load_tokenizer(find_backbone("tiny-bert")), specs)
    evaluation = evaluate_model(model, tasks, family, batch_size=2, autocast=False)
    with torch.no_grad():
        alone = [
            [model(collate([(at, row)], specs, 0))[0][0] for row in task.validation] for at, task in enumerate(tasks)
        ]

    classes = torch.stack(alone[0]).softmax(-1).numpy()
    found, likelihood = columns(evaluation.outcomes, "classes"), evaluation.scores["classes"].likelihood
    assert likelihood.nll == pytest.approx(log_loss(found["label"], classes, labels=[0, 1, 2]), rel=1e-5)
    counts = np.array([2, 3, 1]) + 1
    assert likelihood.prior_nll == pytest.approx(log_loss(found["label"], [counts / 9] * 6, labels=[0, 1, 2]))
    assert found["confidence"] == pytest.approx(classes.max(1), rel=1e-5)

    of_choices = [
        float(logits.log_softmax(-1)[int(row.label)]) for logits, row in zip(alone[2], tasks[2].validation, strict=True)
    ]
    assert columns(evaluation.outcomes, "choices")["log_likelihood"] == pytest.approx(of_choices, rel=1e-4)

    found = columns(evaluation.outcomes, "scores")
    labels = np.array([0.5, 4, 2.5, 3])
    errors = (found["label"] - found["prediction"]) / labels.std()
    expected = stats.norm.logpdf(errors, 0, np.sqrt(np.mean(errors**2)))
    assert found["log_likelihood"] == pytest.approx(expected)
    # The variance is the one that makes the rows most likely.
    assert all(expected.mean() > stats.norm.logpdf(errors, 0, spread).mean() for spread in (0.5, 3.0))
    assert found["prior_log_likelihood"] == pytest.approx(stats.norm.logpdf((labels - 2.5) / labels.std()))


@pytest.mark.parametrize("scale", [0.01, 1.0, 1000.0])
def test_the_skill_of_scores_does_not_depend_on_their_scale(scale):
    labels = [0.5, 4.0, 2.5, 3.0]
    rows = head_rows([scale * label for label in labels], [1] * 4)
    spec = TaskSpec("scores", "regression", (), "pearson_spearman", label_range=(0.0, 5.0 * scale))
    said = of_scores(TokenisedTask(spec, rows, rows), scale * np.array([1.0, 3.5, 2.5, 2.0]))
    wanted = 1 - (0.5 * np.log(2 * np.pi * np.e * 0.375 / np.var(labels))) / (0.5 * np.log(2 * np.pi * np.e))
    assert said.summary(np.full(4, np.nan)).skill == pytest.approx(wanted)


def test_the_prior_has_no_skill(tasks):
    evaluation = evaluate_majority(tasks)
    assert [score.likelihood.skill for score in evaluation.scores.values()] == [0.0, 0.0, 0.0]
    # Of two choices the guess, the second one, has the share of its own count among the two.
    assert columns(evaluation.outcomes, "choices")["confidence"][0] == pytest.approx(3 / 5)


def test_calibration_error_of_two_bins_by_hand():
    confidence, correct = np.array([0.62, 0.68, 0.91, 0.99]), np.array([1.0, 0.0, 1.0, 1.0])
    assert calibration_error(confidence, correct) == pytest.approx(0.5 * abs(0.65 - 0.5) + 0.5 * abs(0.95 - 1))


def with_likelihoods(method: str, seed: int, gain: float):
    """A record and its outcomes in which every row is likelier than under the prior by `gain` nats, and by noise."""
    record, outcomes = make_record(method, seed=seed)
    draw = np.random.default_rng([seed, int(100 * gain)])
    prior = np.log(0.5) - 0.2 * np.random.default_rng(0).random(len(outcomes))
    outcomes = outcomes.assign(
        prior_log_likelihood=prior, log_likelihood=prior + gain + 0.01 * draw.standard_normal(len(outcomes))
    )
    means = outcomes.groupby("task")[["log_likelihood", "prior_log_likelihood"]].mean()
    scores = {
        task: score.model_copy(
            update={
                "likelihood": Likelihood(
                    nll=-means.loc[task, "log_likelihood"],
                    prior_nll=-means.loc[task, "prior_log_likelihood"],
                    calibration_error=0.1,
                )
            }
        )
        for task, score in record.scores.items()
    }
    return record.model_copy(update={"scores": scores}), outcomes


def test_the_declared_endpoint_is_what_is_compared():
    made = [
        with_likelihoods(method, seed, gain) for method, gain in (("alpha", 0.1), ("bravo", 0.2)) for seed in (0, 1)
    ]
    frame = frame_of(*(record for record, _ in made))
    outcomes = pd.concat(
        rows.rename(columns={"label": "truth"}).assign(cell=r.cell.id, label=r.cell.method, seed=r.cell.seed)
        for r, rows in made
    )
    endpoint = Endpoint("skill", ("mrpc", "rte"))
    (fact,) = comparison_table(frame, outcomes, "alpha", endpoint=endpoint).data.to_dict("records")
    table = skill_tables(frame, endpoint)[0].data
    means = table[table["column"] == "mean"].set_index("method")["mean"]
    assert fact["difference"] == pytest.approx(means["bravo"] - means["alpha"])
    assert (fact["tasks"], fact["verdict"]) == (2, "better")
    of_tasks = [r.scores[task].likelihood.skill for r, _ in made[2:] for task in endpoint.tasks]
    assert means["bravo"] == pytest.approx(np.mean(of_tasks))
