"""A timing pass of its own (fixed shapes, warm-up excluded, device synchronised) and its peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.data import Batch, Row, collate
from benchmarks.protocol import TimingPlan
from benchmarks.records import Memory, Quantiles
from benchmarks.seeds import generator
from benchmarks.tasks.base import TaskSpec
from benchmarks.train import Trainer, synchronise

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Measurement:
    """Step times, tokens per timed step, and peak memory."""

    train_step: Quantiles
    inference_step: Quantiles
    tokens: int
    memory: Memory


def measure(
    trainer: Trainer, specs: Sequence[TaskSpec], plan: TimingPlan, *, vocabulary: int, segments: bool
) -> Measurement:
    """Time training and inference steps. To be called last: the steps are real, if with a rate of zero."""
    device = next(trainer.model.parameters()).device
    batch = timing_batch(specs, plan, vocabulary=vocabulary, segments=segments).to(device)
    for group in trainer.optimiser.param_groups:
        group["lr"] = group["initial_lr"] = 0.0
    trainer.schedule.base_lrs = [0.0] * len(trainer.optimiser.param_groups)

    def train_step() -> None:
        trainer.step(batch)

    def inference_step() -> None:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=trainer.autocast),
        ):
            trainer.model(batch)

    trainer.model.train()
    peak = PeakMemory(device)
    training = _time(train_step, plan, device, after_warmup=peak.reset)
    memory = peak.read()
    trainer.model.eval()
    inference = _time(inference_step, plan, device)
    return Measurement(training, inference, batch.tokens, memory)


def timing_batch(specs: Sequence[TaskSpec], plan: TimingPlan, *, vocabulary: int, segments: bool) -> Batch:
    """Random tokens in a full rectangle, the tasks taking turns.

    A multiple-choice row has a single choice here: only so do rows and sequences agree for every list of tasks.
    Its loss is zero, its cost is that of any other sequence.
    """
    rng = generator("timing")
    rows = []
    for position in range(plan.rows):
        task = position % len(specs)
        ids = tuple(map(int, rng.integers(vocabulary // 2, vocabulary, size=plan.length)))
        rows.append((task, Row((ids,), ((0,) * plan.length,) if segments else None, 0.0, position)))
    return collate(rows, specs, pad_token_id=0)


def _time(
    work: Callable[[], None],
    plan: TimingPlan,
    device: torch.device,
    after_warmup: Callable[[], None] | None = None,
) -> Quantiles:
    for _ in range(plan.warmup):
        work()
    synchronise(device)
    if after_warmup is not None:
        after_warmup()
    seconds = []
    for _ in range(plan.repeats):
        start = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    low, median, high = map(float, np.percentile(seconds, (10, 50, 90)))
    return Quantiles(median=median, p10=low, p90=high, repeats=plan.repeats)


class PeakMemory:
    """Peak since `reset`: of CUDA's allocator, or of the process where Linux lets the mark be reset."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._resettable = True

    def reset(self) -> None:
        """Start anew."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            # proc(5): writing 5 sets VmHWM, the peak of the resident set, back to its present size.
            _CLEAR_REFS.write_text("5", encoding="ascii")
        except OSError:
            self._resettable = False

    def read(self) -> Memory:
        """The peak, or None with a kind that says so: a mark that was not reset is another run's."""
        if self._device.type == "cuda":
            return Memory(peak_bytes=torch.cuda.max_memory_allocated(self._device), kind="CUDA allocator")
        if self._resettable:
            for line in _STATUS.read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    return Memory(peak_bytes=int(line.split()[1]) * 1024, kind="process resident set")
        return Memory(peak_bytes=None, kind="not available")
