"""A cell always ends in a record: what is known of it, and why there is no more."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import benchmarks.families.base
from benchmarks.backbones.load import find_backbone
from benchmarks.cells.cell import Bench, prepare, run_cell
from benchmarks.methods.base import Method, Refused
from benchmarks.methods.baselines import HeadsOnly, Majority
from benchmarks.methods.parse import parse_method
from benchmarks.plan.cells import expand
from benchmarks.protocols.protocol import Protocol
from benchmarks.records.schema import RunRecord
from benchmarks.tasks.base import Example, TaskData, TaskSpec

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = TaskSpec("classes", "classification", ("no", "yes"), "accuracy")
ROWS = [Example(f"row {number}", label=number % 2) for number in range(12)]
DATA = (TaskData(SPEC, ROWS, ROWS, "hand-made", "f" * 64),)
PROTOCOL = Protocol(
    name="t", tasks=("classes",), steps=2, batch_size=4, backbone="tiny-bert", precision="fp32",
    timing={"warmup": 1, "repeats": 1, "rows": 2, "length": 8},
)  # fmt: skip


@dataclass(frozen=True)
class Broken(Method):
    """The backbone's last states become `value` once the model is scored."""

    value: float
    name = "broken"
    trains = False

    def attach(self, backbone: nn.Module) -> None:
        def spoil(module: nn.Module, args: object, output: object) -> object:
            if not module.training:
                output.last_hidden_state = torch.full_like(output.last_hidden_state, self.value)
            return output

        backbone.register_forward_hook(spoil)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("bench")
    return prepare(DATA, PROTOCOL, find_backbone("tiny-bert"), torch.device("cpu"), "test", root)


def run(method: Method, bench: Bench, **fields: object) -> tuple[RunRecord, bool]:
    (planned,) = expand(PROTOCOL, (method,), DATA, (0,), **fields)
    record, outcomes = run_cell(planned, bench, lambda *_: None)
    assert record.cell == planned.cell
    assert record.sources == {"classes": "hand-made"}
    return record, outcomes is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_values_are_no_numbers_has_diverged_and_has_no_score(bench: Bench, value: float) -> None:
    record, has_outcomes = run(Broken(value), bench)
    assert record.status == "diverged"
    assert "12 of 12 rows" in str(record.reason)
    assert (record.scores, has_outcomes) == ({}, False)
    assert record.parameters is not None


def test_a_refused_method_loads_nothing(bench: Bench) -> None:
    record, has_outcomes = run(Refused(HeadsOnly(), "no such size"), bench)
    assert (record.status, record.reason) == ("unsupported", "Unsupported: no such size")
    assert (record.backbone, record.parameters, has_outcomes) == (None, None, False)


def test_a_guess_needs_no_model(bench: Bench) -> None:
    record, has_outcomes = run(Majority(), bench)
    assert (record.status, record.backbone, has_outcomes) == ("ok", None, True)
    assert record.scores["classes"].metrics["accuracy"] == 0.5


def test_a_trial_is_not_timed_and_a_reported_cell_is(bench: Bench) -> None:
    reported, _ = run(HeadsOnly(), bench)
    trial, _ = run(HeadsOnly(), bench, trial=True)
    assert reported.timing.train_step is not None
    assert trial.timing.train_step is None
    assert trial.scores == reported.scores
    assert trial.budget == reported.budget
    assert trial.cell.id != reported.cell.id


SECONDS = 0.4


def pretended_compiler(model: nn.Module, mode: str) -> Callable[..., Any]:
    """The eager call, which takes its time for every shape that it has not seen, as a compiler does."""
    seen: set[torch.Size] = set()

    def call(**inputs: Any) -> Any:
        if (shape := inputs["input_ids"].shape) not in seen:
            seen.add(shape)
            time.sleep(SECONDS)
        return model(**inputs)

    return call


@pytest.mark.parametrize("name", ["lora", "smora", "mixlora", "tucka", "flylora"])
def test_what_compiling_takes_is_in_no_time_and_changes_no_number(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """SMoRA and FlyLoRA count tokens and move their biases after a step; TuckA starts from the first batch."""
    monkeypatch.setattr(benchmarks.families.base, "compiled_call", pretended_compiler)
    method = parse_method(name, 1)
    found = []
    for mode in (None, "default"):
        protocol = PROTOCOL.with_overrides(compiled=mode, averaging=0.9)
        (planned,) = expand(protocol, (method,), DATA, (0,))
        started = time.perf_counter()
        record, outcomes = run_cell(planned, bench, lambda *_: None)
        assert record.status == "ok", record.reason
        found.append((record, outcomes, time.perf_counter() - started))
    (eager, expected, _), (compiled, outcomes, wall) = found
    assert wall > 2 * SECONDS  # once in training, once in the timing pass, whose rows are shorter
    assert compiled.timing.train_seconds < SECONDS
    assert compiled.timing.train_step is not None
    assert compiled.timing.train_step.median < SECONDS
    assert compiled.memory == eager.memory
    assert outcomes.equals(expected)
    assert [point.losses for point in compiled.curve] == [point.losses for point in eager.curve]
    assert compiled.cell.protocol.compiled == "default"
    assert compiled.cell.id != eager.cell.id
