"""The timing pass by a clock that the test moves: what is counted, in which unit, and who had the processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.cells import timing_pass as measure
from benchmarks.cells.timing_pass import ProcessorShares, busy_seconds
from benchmarks.protocols.protocol import TimingPlan


class Clocked:
    """A trainer, its model and adapters; a bare forward takes 2 s, an adapted one 3, a training step 7, while the
    machine becomes slower by half with every bare forward.
    """

    def __init__(self) -> None:
        self.now, self.drift, self.adapted, self.calls = 0.0, 1.0, True, 0
        self.model, self.attachment = nn.Linear(1, 1), self
        self.model.forward = self.forward
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: 1.0)
        self.autocast = False

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.adapted = False
        yield
        self.adapted = True

    def forward(self, batch: Any) -> None:
        self.drift *= 1.0 if self.adapted else 1.5
        self.spend(3.0 if self.adapted else 2.0)

    def step(self, batch: Any) -> None:
        assert self.model.training
        assert self.schedule.base_lrs == [0.0]
        self.spend(7.0)

    def spend(self, seconds: float) -> None:
        self.calls += 1
        self.now += 1000.0 if self.calls <= 4 else seconds * self.drift  # the warm-up of training


def test_times_are_counted_in_bare_forwards_beside_them(monkeypatch):
    trainer = Clocked()
    batch = SimpleNamespace(tokens=24)
    batch.to = lambda device: batch
    monkeypatch.setattr(measure, "timing_batch", lambda *args, **kwargs: batch)
    clock = SimpleNamespace(perf_counter=lambda: trainer.now, process_time=lambda: 0.0)
    monkeypatch.setattr(measure, "time", clock)
    plan = TimingPlan(warmup=2, repeats=3)
    taken = measure.measure(trainer, [], plan, None, vocabulary=9, segments=False)  # type: ignore[arg-type]
    assert taken.train_over_bare == pytest.approx(3.5)
    assert taken.inference_over_bare == pytest.approx(1.5)
    # The third to fifth bare forward slowed the training steps, the eighth to tenth those of inference.
    assert taken.train_step.median == pytest.approx(7.0 * 1.5**4)
    assert taken.inference_step.median == pytest.approx(3.0 * 1.5**9)
    assert taken.train_step.p10 > 7.0 * 1.5**3
    assert taken.train_step.p90 < 7.0 * 1.5**5
    assert (taken.train_step.repeats, taken.tokens) == (3, 24)


def test_busy_seconds_are_of_this_process_cores(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu 9 9 9 9 9 9 9 9 0 0\ncpu0 100 20 3 999 999 4 5 68 7 7\ncpu1 9 9 9 9 9 9 9 9 0 0\n"
                    "cpu2 50 0 0 0 0 0 0 0 0 0\nintr 1\n")  # fmt: skip
    monkeypatch.setattr(measure, "_STAT", stat)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 2}, raising=False)
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    assert busy_seconds() == pytest.approx(2.5)
    stat.unlink()
    assert busy_seconds() is None


def test_shares_of_own_threads_and_of_others(monkeypatch):
    clock, own, busy = iter([10.0, 14.0, 14.0, 14.1]), iter([1.0, 7.0, 0.0, 0.0]), iter([100.0, 107.0, 0.0])
    counters = SimpleNamespace(perf_counter=lambda: next(clock), process_time=lambda: next(own))
    monkeypatch.setattr(measure, "time", counters)
    monkeypatch.setattr(measure, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    # In 4 s on two cores: 6 of 8 s for two threads, 1 of 8 s for others.
    assert ProcessorShares(torch.device("cpu")).read() == (0.75, 0.125)
    # A tenth of a second is too short to tell.
    assert ProcessorShares(torch.device("cpu")).read() == (None, None)
