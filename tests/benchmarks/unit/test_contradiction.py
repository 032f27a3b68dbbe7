"""Tasks that contradict each other on the same texts, under one head."""

from __future__ import annotations

import pytest
import torch

from benchmarks.backbones.load import find_backbone
from benchmarks.cells.cell import prepare, run_cell
from benchmarks.cells.data import TokenisedTask
from benchmarks.families.encoder import MultiTaskModel
from benchmarks.methods.parse import parse_method
from benchmarks.plan.cells import expand
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Protocol, load_suite
from benchmarks.tasks import TASKS, load_task
from benchmarks.tasks.flipped import flip, flip_spec
from tests.support import hosts

NAMES = ("q_sst2", "q_sst2_flipped")


def protocol(**fields: object) -> Protocol:
    return Protocol(
        name="t", tasks=NAMES, steps=2, batch_size=4, backbone="tiny-bert", precision="fp32", heads="shared",
        train_rows=40, eval_rows=8, warmup=1, **fields,
    )  # fmt: skip


def test_a_flipped_task_has_the_same_texts_and_the_other_label() -> None:
    plain, flipped = (load_task(name) for name in NAMES)
    for rows, others in ((plain.train, flipped.train), (plain.validation, flipped.validation)):
        assert [(row.first, row.second) for row in rows] == [(row.first, row.second) for row in others]
        assert {int(row.label) + int(other.label) for row, other in zip(rows, others, strict=True)} == {1}
    assert flipped.fingerprint != plain.fingerprint
    assert flipped.source.endswith("labels flipped")
    assert [row.label for row in flip(flipped).train] == [row.label for row in plain.train]


@pytest.mark.parametrize("name", ["q_mnli", "q_stsb"])
def test_only_two_classes_have_an_opposite(name: str) -> None:
    with pytest.raises(ValueError, match="only a task of two classes"):
        flip_spec(TASKS[name])


def test_one_head_reads_all_tasks_and_counts_once(tmp_path: object) -> None:
    data = tuple(load_task(name) for name in NAMES)
    shared = protocol()
    own = shared.model_copy(update={"heads": "own"})
    counts = []
    for each in (shared, own):
        bench = prepare(data, each, find_backbone("tiny-bert"), torch.device("cpu"), "test", tmp_path)  # type: ignore[arg-type]
        (planned,) = expand(each, (parse_method("moelora", 2),), data, (0,), trial=True)
        record, _ = run_cell(planned, bench, lambda *_: None)
        assert record.status == "ok", record.reason
        assert record.parameters is not None
        counts.append(record.parameters.heads)
        assert isinstance(bench.tasks[0], TokenisedTask)
    assert counts[1] == 2 * counts[0] > 0


def test_tasks_of_other_shapes_cannot_share_a_head() -> None:
    specs = (TASKS["q_sst2"], TASKS["q_mnli"])
    with pytest.raises(UsageError, match=r"q_sst2 \(classification, 2\), q_mnli \(classification, 3\)"):
        MultiTaskModel(hosts.bert(), specs, hidden=hosts.WIDTH, stream=("t",), shared=True)


def test_a_shared_head_is_not_fitted() -> None:
    with pytest.raises(ValueError, match="no fit tells tasks apart"):
        protocol(head_start="ridge")


def test_the_protocol_on_real_text_is_declared() -> None:
    suite = load_suite("conflict-sst2")
    assert (suite.heads, suite.endpoint, suite.tasks) == ("shared", "skill", ("sst2", "sst2_flipped"))
