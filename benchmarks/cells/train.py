"""The training loop: one for all methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from benchmarks.backbones.adapters import Adapters
from benchmarks.cells.averaging import WeightAverage
from benchmarks.cells.curve import CurveReader
from benchmarks.cells.data import TokenisedTask
from benchmarks.cells.ledger import Ledger
from benchmarks.cells.order import sorted_within_windows, training_order
from benchmarks.families import AnyFamily, AnyModel
from benchmarks.families.batch import Batch, Row
from benchmarks.instruments.processor import prepare_device, synchronise
from benchmarks.protocols.protocol import Protocol
from benchmarks.protocols.seeds import stream
from benchmarks.records.schema import Checkpoint, CurvePoint

Item = TypeVar("Item")
_NO_MORE = object()


@dataclass(slots=True)
class TrainingLog:
    """What a run leaves behind; filled while it goes on, so that a failed run keeps what there was."""

    curve: list[CurvePoint] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(slots=True)
class Trainer:
    """Model, optimiser and schedule of one cell.

    Attributes:
        model: backbone and heads, if it has any.
        attachment: the adapters; None for the baselines.
        parameters: everything that trains.
        optimiser: AdamW.
        schedule: of the learning rates.
        clip_norm: bound of the gradient norm.
        autocast: whether the forward runs in bfloat16.
        average: of the weights, where it is scored in place of the last ones.
    """

    model: AnyModel
    attachment: Adapters | None
    parameters: list[nn.Parameter]
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    clip_norm: float
    autocast: bool
    average: WeightAverage | None = None

    def step(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step; losses by name and the gradient norm before clipping, left on the device."""
        losses = self._backward(batch)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimiser.step()
        if self.attachment is not None:
            self.attachment.after_step()
        if self.average is not None:
            self.average.update()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)
        return {name: loss.detach() for name, loss in losses.items()}, norm

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the sum of all losses; the losses by name."""
        with torch.autocast(batch.task_ids.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            logits = self.model(batch)
            losses = {"task": self.model.loss(logits, batch)}
        if self.attachment is not None:
            losses.update(self.attachment.aux_losses())
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return losses

    def rehearse(self, batch: Batch) -> None:
        """Forward and backward that leave nothing behind, so that a compiler has seen the batch's shape.

        Twice: a first forward is another graph than all that follow, and a method may start from its first batch.
        """
        trained = {id(parameter) for parameter in self.parameters}
        names = [name for name, parameter in self.model.named_parameters() if id(parameter) in trained]
        names += [name for name, _ in self.model.named_buffers()]
        state = self.model.state_dict()
        before = {name: state[name].clone() for name in names if name in state}
        for _ in range(2):
            self._backward(batch)
            if self.attachment is not None:
                self.attachment.after_step()  # takes what the forward has counted
        # Loaded, not copied: a module may know beside its tensors that it has started.
        self.model.load_state_dict(before, strict=False)
        self.optimiser.zero_grad(set_to_none=True)

    def scored_weights(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that are scored."""
        return nullcontext() if self.average is None else self.average.applied()

    def account(self) -> str:
        """What the optimiser did, as it says itself: equal for all methods of a comparison, whatever their rates."""
        settings = {name: self.optimiser.defaults[name] for name in ("betas", "eps")}
        # Vectors never decay. Whether a method has any is its own affair, and no difference of budgets.
        decay = sorted({0.0, *(group["weight_decay"] for group in self.optimiser.param_groups)})
        rates = [group["lr"] / group["initial_lr"] for group in self.optimiser.param_groups]
        return (
            f"{type(self.optimiser).__name__} {settings}, weight decay {decay}, norm clipped at {self.clip_norm}, "
            f"{self.schedule.last_epoch} updates, rates at {max(rates):.6f} of their peak at the end"
        )


def make_trainer(model: AnyModel, attachment: Adapters | None, protocol: Protocol) -> Trainer:
    """Optimiser and schedule as the protocol says, over whatever of the model trains."""
    from transformers import get_scheduler

    encoder = attachment.parameters() if attachment else (p for p in model.backbone.parameters() if p.requires_grad)
    groups = [
        *_decay_groups(list(encoder), protocol.learning_rate, protocol.weight_decay),
        *_decay_groups(
            list(model.heads.parameters()),
            protocol.head_learning_rate or protocol.learning_rate,
            protocol.weight_decay,
        ),
    ]
    # Fused: one kernel for all parameters, where a step of small tensors is a matter of launches.
    on_cuda = next(model.parameters()).device.type == "cuda"
    optimiser = torch.optim.AdamW(groups, fused=True if on_cuda else None)
    schedule = get_scheduler(
        {"linear": "linear", "constant": "constant_with_warmup"}[protocol.schedule],
        optimiser,
        num_warmup_steps=protocol.warmup_steps,
        num_training_steps=protocol.steps,
    )
    parameters = [parameter for group in groups for parameter in group["params"]]
    return Trainer(
        model,
        attachment,
        parameters,
        optimiser,
        schedule,
        protocol.clip_norm,
        protocol.precision == "bf16",
        None if protocol.averaging is None else WeightAverage(parameters, protocol.averaging),
    )


def _decay_groups(parameters: list[nn.Parameter], rate: float, decay: float) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    parts = ((matrices, decay), (vectors, 0.0))
    return [{"params": part, "lr": rate, "weight_decay": weight} for part, weight in parts if part]


def training_batches(
    tasks: Sequence[TokenisedTask], family: AnyFamily, seed: int, ledger: Ledger, device: torch.device
) -> Iterator[Batch]:
    """The batches of a run on `device`, in an order that the protocol and the seed alone decide.

    Each is prepared while the one before it is trained on. It is entered in `ledger` when it is handed out.
    """
    protocol = family.protocol
    names = (protocol.name, seed, "order")
    order = training_order(
        {task.spec.name: len(task.train) for task in tasks},
        steps=protocol.steps,
        batch_size=protocol.batch_size,
        stream=names,
        mixed=protocol.batches == "mixed",
    )
    # Rows of several steps that are sorted together would be mixed again.
    window = protocol.length_window if protocol.batches == "mixed" else 1

    def length(slot: tuple[int, int]) -> int:
        return tasks[slot[0]].train[slot[1]].length

    def prepared() -> Iterator[tuple[list[tuple[int, Row]], Batch]]:
        prepare_device(device)  # a thread has a current device of its own
        for slots in sorted_within_windows(order, length, window=window, stream=names):
            rows = [(task, tasks[task].train[index]) for task, index in slots]
            yield rows, family.training_batch(rows).staged(device)

    for rows, batch in one_ahead(prepared()):
        ledger.add(rows, batch)
        yield batch.to(device)


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items, each made by a thread while the one before it is used; what making one raises is raised here."""
    source = iter(items)
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, source, _NO_MORE)
        while (item := following.result()) is not _NO_MORE:
            following = thread.submit(next, source, _NO_MORE)
            yield cast(Item, item)


def train(
    trainer: Trainer,
    batches: Iterator[Batch],
    *,
    protocol: Protocol,
    seed: int,
    log: TrainingLog,
    on_step: Callable[[int, float | None], None],
    examine: Callable[[int, float], Checkpoint],
) -> None:
    """Train to the end of `batches`, noting the curve in `log`.

    Args:
        trainer: with model and optimiser.
        batches: of the run.
        protocol: of the cell.
        seed: of the cell.
        log: gets the curve, the checkpoints and the seconds.
        on_step: called after every step, with the task loss of the last point that has come from the device.
        examine: scores the model after this step and so many seconds of training; its own seconds count for nothing.

    Raises:
        Diverged: a loss or the gradient norm became infinite or NaN.
    """
    trainer.model.train()
    device = next(trainer.model.parameters()).device
    reader, clock = CurveReader(log.curve, device), _Clock(log, device)
    compiled_for: set[torch.Size] = set()
    with clock.running():
        for step, batch in enumerate(batches, start=1):
            # Anew for each step: whatever a method draws in one step shifts no dropout mask of the next.
            torch.manual_seed(stream(protocol.name, seed, "noise", step))
            shape = batch.inputs["input_ids"].shape
            if protocol.compiled is not None and shape not in compiled_for:
                compiled_for.add(shape)
                with clock.paused(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                    trainer.rehearse(batch)
            rate = float(trainer.optimiser.param_groups[0]["lr"])
            losses, norm = trainer.step(batch)
            values = reader.watch(step, losses, norm)
            if step == 1 or step % protocol.log_every == 0 or step == protocol.steps:
                reader.note(step, rate, tuple(losses), values)
            on_step(step, log.curve[-1].losses["task"] if log.curve else None)
            if step in protocol.examinations:
                with clock.paused():
                    reader.catch_up()
                    log.checkpoints.append(examine(step, log.seconds))
                    trainer.model.train()
        reader.catch_up()


@dataclass(slots=True)
class _Clock:
    """Adds the seconds that training takes to its log."""

    log: TrainingLog
    device: torch.device
    _since: float = 0.0

    def running(self) -> AbstractContextManager[None]:
        """What happens inside counts."""
        return _between(self._start, self._stop)

    def paused(self) -> AbstractContextManager[None]:
        """What happens inside does not count."""
        return _between(self._stop, self._start)

    def _start(self) -> None:
        synchronise(self.device)
        self._since = time.perf_counter()

    def _stop(self) -> None:
        synchronise(self.device)
        self.log.seconds += time.perf_counter() - self._since


@contextmanager
def _between(before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    before()
    try:
        yield
    finally:
        after()
