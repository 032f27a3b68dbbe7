"""The timing pass by a clock that the test moves: what is counted, in which unit, and who had the processor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.cells import timing_pass
from benchmarks.instruments.processor import ProcessorTimes, processor_shares, read_processor
from benchmarks.protocols.protocol import TimingPlan


class Clocked:
    """A trainer, its model and adapters: a bare forward takes 2 s, an adapted one 3, a training step 7.

    The machine becomes slower by half after every second piece of work.
    """

    def __init__(self) -> None:
        self.now, self.adapted, self.calls = 0.0, True, 0
        self.model, self.attachment = nn.Linear(1, 1), self
        self.model.forward = self.forward
        self.model.eagerly = nullcontext
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: 1.0)
        self.autocast = False

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.adapted = False
        yield
        self.adapted = True

    def forward(self, batch: Any) -> None:
        self.spend(3.0 if self.adapted else 2.0)

    def step(self, batch: Any) -> None:
        assert self.model.training
        assert self.schedule.base_lrs == [0.0]
        self.spend(7.0)

    def spend(self, seconds: float) -> None:
        warming_up = self.calls < 4
        self.now += 1000.0 if warming_up else seconds * 1.5 ** (self.calls // 2)
        self.calls += 1


def measure(trainer: Clocked, monkeypatch: pytest.MonkeyPatch) -> timing_pass.Measurement:
    batch = SimpleNamespace(tokens=24)
    batch.to = lambda device: batch
    monkeypatch.setattr(timing_pass, "timing_batch", lambda *args, **kwargs: batch)
    monkeypatch.setattr(time, "perf_counter", lambda: trainer.now)
    plan = TimingPlan(warmup=2, repeats=3)
    return timing_pass.measure(trainer, None, plan)  # type: ignore[arg-type]


def test_times_are_counted_in_bare_forwards_beside_them(monkeypatch):
    taken = measure(Clocked(), monkeypatch)
    assert taken.train_over_bare == pytest.approx(3.5)
    assert taken.inference_over_bare == pytest.approx(1.5)
    # Rounds of two pieces of work: two of warm-up and three that count, of training and then of inference.
    assert taken.train_step.median == pytest.approx(7.0 * 1.5**3)
    assert taken.inference_step.median == pytest.approx(3.0 * 1.5**8)
    assert 7.0 * 1.5**2 < taken.train_step.p10 < taken.train_step.p90 < 7.0 * 1.5**4
    assert (taken.train_step.repeats, taken.tokens) == (3, 24)


def test_a_step_that_fails_while_it_is_timed_fails_the_cell(monkeypatch):
    trainer = Clocked()

    def fail(batch: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    trainer.step = fail
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        measure(trainer, monkeypatch)


# ---------------------------------------------------------------------- who had the processor

BEFORE = ProcessorTimes(wall=10.0, own=1.0, busy=100.0, cores=2, threads=2)


def test_shares_of_own_threads_and_of_others():
    # In 4 s on two cores: 6 of 8 s for two threads, 1 of 8 s for others.
    after = replace(BEFORE, wall=14.0, own=7.0, busy=107.0)
    assert processor_shares(BEFORE, after) == (0.75, 0.125)
    assert processor_shares(BEFORE, replace(after, threads=1)) == (1.5, 0.125)
    assert processor_shares(BEFORE, replace(after, busy=None)) == (0.75, None)
    # The two counters do not tick together.
    assert processor_shares(BEFORE, replace(after, busy=105.0)) == (0.75, 0.0)
    # A tenth of a second is too short to tell.
    assert processor_shares(BEFORE, replace(after, wall=10.1)) == (None, None)


def test_the_cores_of_this_process_are_read():
    before = read_processor()
    while time.process_time() - before.own < 0.2:
        pass
    after = read_processor()
    assert after.own - before.own >= 0.2
    assert after.wall > before.wall
    if before.busy is not None:
        assert after.busy - before.busy >= 0.1  # counted in hundredths of a second
        assert after.cores >= 1
