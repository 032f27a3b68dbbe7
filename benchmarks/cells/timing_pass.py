"""A timing pass of its own (fixed shapes, warm-up excluded, device synchronised) and its peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cells.train import Trainer
from benchmarks.families import AnyFamily
from benchmarks.families.batch import Batch
from benchmarks.instruments.clock import Step, interleave, paired_ratio, quantiles
from benchmarks.instruments.memory import held, memory_kind, peak_above
from benchmarks.instruments.processor import processor_shares, read_processor
from benchmarks.protocols.protocol import TimingPlan
from benchmarks.protocols.seeds import generator
from benchmarks.records.schema import Memory, Quantiles


@dataclass(frozen=True, slots=True)
class Measurement:
    """Step times, tokens per timed step, peak memory, and who had the processor meanwhile (`processor_shares`).

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


def measure(trainer: Trainer, family: AnyFamily, plan: TimingPlan) -> Measurement:
    """Time training and inference steps. To be called last: the steps are real, if with a rate of zero."""
    device = next(trainer.model.parameters()).device
    batch = timing_batch(family, plan).to(device)
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
    before = read_processor()
    training, training_over = _time(train_step, bare_forward, plan, device)
    trainer.model.eval()
    inference, inference_over = _time(inference_step, bare_forward, plan, device)
    disturbance = processor_shares(before, read_processor()) if device.type == "cpu" else (None, None)
    trainer.model.train()
    with nullcontext() if device.type == "cuda" else trainer.model.eagerly():  # compiled code shows no tensors
        peak = held(_standing(trainer), device) + peak_above(train_step, device)
    memory = Memory(peak_bytes=peak, kind=memory_kind(device))
    return Measurement(training, inference, training_over, inference_over, batch.tokens, memory, *disturbance)


def _standing(trainer: Trainer) -> Iterator[Tensor]:
    """The tensors that are there between steps."""
    yield from trainer.model.parameters()
    yield from trainer.model.buffers()
    for state in trainer.optimiser.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def timing_batch(family: AnyFamily, plan: TimingPlan) -> Batch:
    """Random tokens in a full rectangle, the tasks taking turns; each row has one answer at most."""
    rng = generator("timing")
    vocabulary = len(family.tokenizer)
    rows = []
    for position in range(plan.rows):
        task = position % len(family.specs)
        ids = tuple(map(int, rng.integers(vocabulary // 2, vocabulary, size=plan.length)))
        rows.append((task, family.timing_row(ids)))
    batch: Batch = family.training_batch(rows)
    return batch


def _time(
    work: Callable[[], None], unit: Callable[[], None], plan: TimingPlan, device: torch.device
) -> tuple[Quantiles, float]:
    """Seconds of `work`, and the median over rounds of its time over that of `unit` in the same round."""
    steps = [Step("unit", unit), Step("work", work)]
    timings = interleave(steps, warmup=plan.warmup, repeats=plan.repeats, device=device)
    for error in timings.failures.values():
        raise error
    seconds = timings.seconds["work"]
    return quantiles(seconds), paired_ratio(seconds, timings.seconds["unit"]).estimate
