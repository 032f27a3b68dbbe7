"""One run, a whole curve: heads from a fit, averaged weights, checkpoints that are ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.optim.swa_utils import get_ema_avg_fn

from benchmarks.backbones.load import find_backbone
from benchmarks.cells.averaging import WeightAverage
from benchmarks.cells.cell import prepare, run_cell
from benchmarks.cells.heads import STRENGTHS, fit_head
from benchmarks.families.batch import HeadRow
from benchmarks.methods.baselines import HeadsOnly
from benchmarks.methods.parse import parse_method
from benchmarks.plan.cells import expand
from benchmarks.protocols.protocol import Protocol
from benchmarks.records.schema import Checkpoint
from benchmarks.reporting.endpoint import Endpoint
from benchmarks.reporting.progress import progress_tables, steps_to
from benchmarks.tasks.base import Example, TaskData, TaskSpec
from tests.support.record_factory import make_record
from tests.support.tables import frame_of, row_of

CLASSES = TaskSpec("classes", "classification", ("no", "yes"), "accuracy")
THREE = TaskSpec("three", "classification", ("a", "b", "c"), "accuracy")
SCORES = TaskSpec("scores", "regression", (), "pearson_spearman", label_range=(0.0, 5.0))
CHOICES = TaskSpec("choices", "multiple_choice", (), "accuracy")


def rows_of(labels: np.ndarray) -> list[HeadRow]:
    return [HeadRow(sequences=((1,),), segments=None, label=float(label), index=at) for at, label in enumerate(labels)]


def test_the_average_is_torchs_with_a_decay_that_rises_and_leaves_the_weights_alone():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average, expected = WeightAverage([weight], 0.3), weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            weight.add_(step)
        average.update()
        expected = get_ema_avg_fn(min(0.3, (1 + step) / (10 + step)))(expected, weight.detach(), step)
    last = weight.detach().clone()
    with average.applied():
        assert weight.tolist() == pytest.approx(expected.tolist())
    assert torch.equal(weight, last)


def test_heads_are_scikit_learns_fits():
    draw = np.random.default_rng(0)
    features = draw.normal(3.0, 2.0, size=(60, 4))
    standard = (features - features.mean(0)) / features.std(0)
    for spec in (CLASSES, THREE):
        labels = (features[:, 0] + draw.normal(size=60) > 3).astype(int) + (features[:, 1] > 5) * (spec is THREE)
        head = fit_head(spec, rows_of(labels), [one[None] for one in features])
        logits = torch.as_tensor(features @ head.weight.T + head.bias)
        candidates = [LogisticRegression(C=c, max_iter=500).fit(standard, labels) for c in STRENGTHS]
        gaps = [np.abs(one.predict_proba(standard) - logits.softmax(-1).numpy()).max() for one in candidates]
        assert min(gaps) < 1e-3
    # The bias of a score's head has no penalty: at the optimum the mean prediction is the mean score.
    scores = np.clip(features[:, 0], 0, 5)
    head = fit_head(SCORES, rows_of(scores), [one[None] for one in features])
    said = 5 / (1 + np.exp(-(features @ head.weight[0] + head.bias[0])))
    assert said.mean() == pytest.approx(scores.mean(), abs=1e-3)
    assert np.corrcoef(said, scores)[0, 1] > 0.9
    sets = [draw.normal(size=(3, 4)) for _ in range(40)]
    right = np.array([one[:, 2].argmax() for one in sets])
    head = fit_head(CHOICES, rows_of(right), sets)
    assert np.mean([(one @ head.weight[0]).argmax() == label for one, label in zip(sets, right, strict=True)]) > 0.9


WORDS = ("good", "bad", "fine", "poor")
ROWS = [Example(f"a {WORDS[number % 4]} row {number}", label=number % 2) for number in range(24)]
DATA = (TaskData(CLASSES, ROWS, ROWS, "hand-made", "f" * 64),)


def run(root, method, **fields):
    protocol = Protocol(
        name="t", tasks=("classes",), batch_size=4, backbone="tiny-bert", precision="fp32", length_window=1, warmup=2,
        schedule="constant", averaging=0.9, head_start="ridge", **fields,
    )  # fmt: skip
    bench = prepare(DATA, protocol, find_backbone("tiny-bert"), torch.device("cpu"), "test", root)
    (planned,) = expand(protocol, (method,), DATA, (0,), trial=True)
    record, _ = run_cell(planned, bench, lambda *_: None)
    assert record.status == "ok", record.reason
    return record


@pytest.mark.usefixtures("one_thread")
def test_a_checkpoint_is_the_end_of_a_shorter_run_and_head_is_the_fit(tmp_path):
    lora = parse_method("lora", 1)
    long = run(tmp_path, lora, steps=6, checkpoints=(3, 50), checkpoint_rows=24)
    short = run(tmp_path, lora, steps=3)
    assert [point.step for point in long.checkpoints] == [3, 6]
    ends = [record.scores["classes"].likelihood.skill for record in (short, long)]
    assert [point.skills["classes"] for point in long.checkpoints] == ends
    assert len({*ends}) == 2
    head = run(tmp_path, HeadsOnly(), steps=3)
    assert head.budget is None
    assert head.scores["classes"].likelihood.skill > 0


def test_progress_says_when_the_references_quality_is_reached():
    def made(method: str, *skills: float):
        points = [
            Checkpoint(step=step, seconds=step / 10, rows={"rte": 50}, metrics={"rte": 0.5}, skills={"rte": skill})
            for step, skill in zip((100, 200, 400), skills, strict=True)
        ]
        return make_record(method)[0].model_copy(update={"checkpoints": points})

    frame = frame_of(made("alpha", 0.1, 0.2, 0.3), made("bravo", 0.0, 0.1, 0.3), made("late", 0.0, 0.0, 0.1))
    (table,) = progress_tables(frame, "alpha", Endpoint("skill", ("rte",)))
    assert row_of(table.text, "bravo")["400"] == "30.0"
    assert [row_of(table.text, name)["steps to quality"] for name in ("alpha", "bravo", "late")] == [
        "200",
        "300",
        "n/a",
    ]
    assert row_of(table.text, "bravo")["seconds to quality"] == "30"
    assert steps_to({100: 0.5, 200: 0.4}, 0.5) == 100
