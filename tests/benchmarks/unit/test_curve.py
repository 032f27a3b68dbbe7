"""The training curve: read without waiting for the device, and a run that is no longer finite is stopped."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cells.curve import CurveReader
from benchmarks.records.failures import Diverged
from benchmarks.records.schema import CurvePoint


class Event:
    """A mark in the queue of a device that is as far as `done` says."""

    done = 0
    made = 0
    waited = 0

    def record(self) -> None:
        Event.made += 1
        self.number = Event.made

    def query(self) -> bool:
        return self.number <= Event.done

    def synchronize(self) -> None:
        Event.waited += 1


class Device:
    """The CPU under another name, so that values can be looked at."""

    type = "cuda"


def note(reader: CurveReader, step: int, loss: float) -> None:
    losses = {"task": torch.tensor(loss), "balance": torch.tensor(0.5, dtype=torch.bfloat16)}
    values = reader.watch(step, losses, torch.tensor(2.0))
    reader.note(step, 1e-3, tuple(losses), values)


def test_on_a_cpu_a_point_is_read_at_once() -> None:
    curve: list[CurvePoint] = []
    reader = CurveReader(curve, torch.device("cpu"))
    note(reader, 1, 0.25)
    assert curve == [CurvePoint(step=1, losses={"task": 0.25, "balance": 0.5}, learning_rate=1e-3, gradient_norm=2.0)]
    with pytest.raises(Diverged, match="since step 2"):
        note(reader, 2, float("nan"))
    assert len(curve) == 1


def test_a_step_between_the_points_is_watched() -> None:
    reader = CurveReader([], torch.device("cpu"))
    reader.watch(1, {"task": torch.tensor(1.0)}, torch.tensor(float("inf")))
    with pytest.raises(Diverged, match="since step 1"):
        note(reader, 2, 0.25)


def test_a_step_after_the_last_point_is_found_before_the_model_is_scored() -> None:
    reader = CurveReader([], torch.device("cpu"))
    note(reader, 1, 0.25)
    reader.catch_up()
    reader.watch(2, {"task": torch.tensor(float("nan"))}, torch.tensor(1.0))
    with pytest.raises(Diverged, match="since step 2"):
        reader.catch_up()


def test_on_a_gpu_nobody_waits_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    curve: list[CurvePoint] = []
    reader = CurveReader(curve, torch.device("cpu"))
    monkeypatch.setattr(reader, "device", Device())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for step in (1, 2, 3):
        note(reader, step, float(step))
        Event.done = step - 1  # the device is two steps behind
    assert [point.step for point in curve] == [1]
    assert Event.waited == 0
    reader.catch_up()
    assert [point.step for point in curve] == [1, 2, 3]
    assert Event.waited == 2
