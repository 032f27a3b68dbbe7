"""A timing pass of its own (fixed shapes, warm-up excluded, device synchronised) and its peak memory."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.cells.train import Trainer, synchronise
from benchmarks.families import Family
from benchmarks.families.batch import Batch
from benchmarks.instruments.memory import held, memory_kind, peak_above
from benchmarks.protocols.protocol import TimingPlan
from benchmarks.protocols.seeds import generator
from benchmarks.records.schema import Memory, Quantiles
from benchmarks.tasks.base import TaskSpec

_STAT = Path("/proc/stat")
# The kernel counts in hundredths of a second: a shorter span says nothing.
_SHORTEST_SPAN = 0.5


@dataclass(frozen=True, slots=True)
class Measurement:
    """Step times, tokens per timed step, peak memory, and who had the processor meanwhile (`ProcessorShares`).

    Cells are timed minutes apart, and a machine's speed drifts: the bare model's forward, timed in turn with the steps,
    is the unit in which cells compare.
    """

    train_step: Quantiles
    inference_step: Quantiles
    train_over_bare: float
    inference_over_bare: float
    tokens: int
    memory: Memory
    own_share: float | None = None
    others_share: float | None = None


def measure(
    trainer: Trainer,
    specs: Sequence[TaskSpec],
    plan: TimingPlan,
    family: Family,
    *,
    vocabulary: int,
    segments: bool,
) -> Measurement:
    """Time training and inference steps. To be called last: the steps are real, if with a rate of zero."""
    device = next(trainer.model.parameters()).device
    batch = timing_batch(specs, plan, family, vocabulary=vocabulary, segments=segments).to(device)
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

    def bare_forward() -> None:
        attachment = trainer.attachment
        with nullcontext() if attachment is None else attachment.disabled():
            inference_step()

    trainer.model.train()
    shares = ProcessorShares(device)
    training, training_over = _time(train_step, bare_forward, plan, device)
    trainer.model.eval()
    inference, inference_over = _time(inference_step, bare_forward, plan, device)
    disturbance = shares.read()
    trainer.model.train()
    memory = Memory(
        peak_bytes=held(_standing(trainer), device) + peak_above(train_step, device), kind=memory_kind(device)
    )
    return Measurement(training, inference, training_over, inference_over, batch.tokens, memory, *disturbance)


def _standing(trainer: Trainer) -> Iterator[Tensor]:
    """The tensors that are there between steps."""
    yield from trainer.model.parameters()
    yield from trainer.model.buffers()
    for state in trainer.optimiser.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def timing_batch(
    specs: Sequence[TaskSpec], plan: TimingPlan, family: Family, *, vocabulary: int, segments: bool
) -> Batch:
    """Random tokens in a full rectangle, the tasks taking turns; each row has one answer at most."""
    rng = generator("timing")
    rows = []
    for position in range(plan.rows):
        task = position % len(specs)
        ids = tuple(map(int, rng.integers(vocabulary // 2, vocabulary, size=plan.length)))
        rows.append((task, family.timing_row(ids, segments=segments)))
    return family.training_batch(rows, specs, 0)


def _time(
    work: Callable[[], None],
    unit: Callable[[], None],
    plan: TimingPlan,
    device: torch.device,
) -> tuple[Quantiles, float]:
    """Seconds of `work`, and the median over rounds of its time over that of `unit`, run just before it."""
    for _ in range(plan.warmup):
        unit()
        work()
    synchronise(device)
    seconds: dict[Callable[[], None], list[float]] = {unit: [], work: []}
    for _ in range(plan.repeats):
        for each, spent in seconds.items():
            start = time.perf_counter()
            each()
            synchronise(device)
            spent.append(time.perf_counter() - start)
    low, median, high = map(float, np.percentile(seconds[work], (10, 50, 90)))
    over = float(np.median(np.divide(seconds[work], seconds[unit])))
    return Quantiles(median=median, p10=low, p90=high, repeats=plan.repeats), over


def keep_free_memory(device: torch.device) -> None:
    """From now on this process keeps the processor's memory that it frees, as torch does with a GPU's.

    Else every large tensor costs page faults or none, as the order of what was freed before it has it: some per cent
    of a training step, and not the same for two contestants in one process.
    """
    if device.type == "cpu":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
        if set_option is not None:
            trim_threshold, mmap_max = -1, -4
            set_option(trim_threshold, 2**31 - 1)
            set_option(mmap_max, 0)


class ProcessorShares:
    """Since it was made: how much of its threads' time this process ran, and how much of its cores others took."""

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"
        self._start = time.perf_counter(), time.process_time(), busy_seconds()

    def read(self) -> tuple[float | None, float | None]:
        """Own share of wall time x threads, others' share of wall time x cores; None where it is not known.

        Time that another guest of the same host took from a virtual machine counts as the others'.
        """
        wall, own = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        if not self._on_cpu or wall < _SHORTEST_SPAN:
            return None, None
        busy, before = busy_seconds(), self._start[2]
        others = None
        if busy is not None and before is not None:
            others = round(min(1.0, max(0.0, (busy - before - own) / (wall * len(os.sched_getaffinity(0))))), 4)
        return round(own / (wall * torch.get_num_threads()), 4), others


def busy_seconds() -> float | None:
    """Seconds since boot that the cores of this process were not idle; None where the system does not tell."""
    if not _STAT.is_file() or not hasattr(os, "sched_getaffinity"):
        return None
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in _STAT.read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if name in cores:
            # proc(5): user, nice, system, idle, iowait, irq, softirq, steal; guests are counted in user.
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")
