"""Run a cell: one method with one seed under one protocol, always ending in a record."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.backbones.adapters import Adapters
from benchmarks.backbones.load import BackboneSource, describe, load_tokenizer
from benchmarks.cells.data import TokenisedTask, tokenise_task
from benchmarks.cells.evaluate import Evaluation, evaluate_majority, evaluate_model
from benchmarks.cells.examination import Examiner
from benchmarks.cells.head_store import stored_heads
from benchmarks.cells.heads import Head, start_from
from benchmarks.cells.ledger import Ledger
from benchmarks.cells.routing import collect
from benchmarks.cells.swaps import swap_ids
from benchmarks.cells.timing_pass import Measurement, measure
from benchmarks.cells.train import TrainingLog, make_trainer, train, training_batches
from benchmarks.families import AnyFamily, AnyModel, family_of
from benchmarks.families.encoder import MultiTaskModel
from benchmarks.plan.cells import PlannedCell
from benchmarks.protocols.protocol import Protocol
from benchmarks.protocols.seeds import torch_stream
from benchmarks.records.failures import one_line, status_of, traceback_tail
from benchmarks.records.provenance import code_state, gather
from benchmarks.records.schema import Parameters, Routing, RunRecord, Status, Swapped, Timing
from benchmarks.tasks.base import TaskData
from moepeft import Attachment
from moepeft.counting import count_added_by_task

OnStep = Callable[[int, float | None], None]
"""Is told every step and the last task loss that is known."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cells of a run share.

    Attributes:
        tasks: their rows, tokenised, in the order of the protocol.
        tokenizer: of the backbone.
        source: where the backbone comes from.
        device: where to run.
        command: as it was typed.
        timed: whether cells end with a timing pass; not if others run beside them.
        heads: fitted ones that all cells start from; None for random ones.
    """

    tasks: tuple[TokenisedTask, ...]
    tokenizer: Any
    source: BackboneSource
    device: torch.device
    command: str
    timed: bool = True
    heads: Mapping[str, Head] | None = None

    @property
    def sources(self) -> dict[str, str]:
        """Where the rows of every task come from."""
        return {task.spec.name: task.source for task in self.tasks}


def prepare(
    data: Sequence[TaskData],
    protocol: Protocol,
    source: BackboneSource,
    device: torch.device,
    command: str,
    root: Path,
) -> Bench:
    """Tokenise the rows that cells of a protocol share, whatever their learning rates; heads are kept in `root`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    code_state()  # now: the state of the code that runs, and before tokenisers have started threads
    tokenizer = load_tokenizer(source)
    family = family_of(protocol, tokenizer, [task.spec for task in data])
    tasks = tuple(tokenise_task(task, family) for task in data)
    heads = stored_heads(root, tasks, family, source, device) if protocol.head_start == "ridge" else None
    return Bench(tasks, tokenizer, source, device, command, heads=heads)


# ---------------------------------------------------------------------- running


@dataclass(slots=True)
class _Findings:
    """What is known of a cell so far; a failing cell keeps it."""

    log: TrainingLog = field(default_factory=TrainingLog)
    ledger: Ledger | None = None
    backbone: str | None = None
    parameters: Parameters | None = None
    evaluation: Evaluation | None = None
    measurement: Measurement | None = None
    routing: Routing | None = None
    swapped: Swapped | None = None
    setup_seconds: float = 0.0
    evaluate_seconds: float = 0.0

    def timing(self) -> Timing:
        steps = self.measurement
        return Timing(
            setup_seconds=self.setup_seconds,
            train_seconds=self.log.seconds,
            evaluate_seconds=self.evaluate_seconds,
            train_step=steps.train_step if steps else None,
            inference_step=steps.inference_step if steps else None,
            train_tokens_per_second=steps.tokens / steps.train_step.median if steps else None,
            inference_tokens_per_second=steps.tokens / steps.inference_step.median if steps else None,
            train_over_bare=steps.train_over_bare if steps else None,
            inference_over_bare=steps.inference_over_bare if steps else None,
            own_share=steps.own_share if steps else None,
            others_share=steps.others_share if steps else None,
        )


def run_cell(planned: PlannedCell, bench: Bench, on_step: OnStep) -> tuple[RunRecord, pd.DataFrame | None]:
    """Run one cell to its record, whatever happens on the way; and its per-example outcomes if it got that far."""
    provenance = gather(bench.device, planned.cell.protocol.precision, bench.command)
    found = _Findings()
    status: Status = "ok"
    reason = trace = None
    try:
        _run(planned, bench, found, on_step)
    except KeyboardInterrupt:
        status, reason = "interrupted", "stopped by the user; the same command runs this cell again"
    except Exception as error:
        status, reason, trace = status_of(error), one_line(error), traceback_tail(error)
    # What a failed cell allocated must not fail the next one.
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    evaluation, measurement = found.evaluation, found.measurement
    record = RunRecord(
        cell=planned.cell,
        status=status,
        reason=reason,
        traceback=trace,
        budget=None if found.ledger is None else found.ledger.budget(),
        parameters=found.parameters,
        scores={} if evaluation is None else evaluation.scores,
        timing=found.timing(),
        memory=None if measurement is None else measurement.memory,
        curve=found.log.curve,
        checkpoints=found.log.checkpoints,
        backbone=found.backbone,
        sources=bench.sources,
        routing=found.routing,
        swapped=found.swapped,
        outcomes=None,  # named by the store
        provenance=provenance,
    )
    return record, None if evaluation is None else evaluation.outcomes


def _run(planned: PlannedCell, bench: Bench, found: _Findings, on_step: OnStep) -> None:
    protocol = planned.cell.protocol
    planned.method.check()
    if not planned.method.needs_model:
        found.parameters = _count(None, None, len(bench.tasks))
        found.evaluation = evaluate_majority(bench.tasks)
        return
    family = family_of(protocol, bench.tokenizer, [task.spec for task in bench.tasks])
    start = time.perf_counter()
    model = _set_up(planned, bench, family, found)
    trainer = make_trainer(model, model.attachment, protocol) if planned.method.trains_under(protocol) else None
    found.setup_seconds = time.perf_counter() - start

    if trainer is not None:
        seed = planned.cell.seed
        found.ledger = Ledger([task.spec.name for task in bench.tasks])
        batches = training_batches(bench.tasks, family, seed, found.ledger, bench.device)
        examine = Examiner(trainer, bench.tasks, family)
        train(trainer, batches, protocol=protocol, seed=seed, log=found.log, on_step=on_step, examine=examine)
        found.ledger.optimiser = trainer.account()

    start = time.perf_counter()
    autocast = protocol.precision == "bf16"
    with nullcontext() if trainer is None else trainer.scored_weights():
        found.evaluation = evaluate_model(
            model, bench.tasks, family, batch_size=protocol.eval_batch_size, autocast=autocast
        )
        found.evaluate_seconds = time.perf_counter() - start
        if protocol.evaluate_on == "reported":
            found.routing = collect(model, bench.tasks, family, autocast=autocast)
            found.swapped = swap_ids(model, bench.tasks, family, autocast=autocast)
    if not bench.timed or planned.cell.trial or trainer is None:
        return
    found.measurement = measure(trainer, family, protocol.timing)


def _set_up(planned: PlannedCell, bench: Bench, family: AnyFamily, found: _Findings) -> AnyModel:
    protocol, seed = planned.cell.protocol, planned.cell.seed
    model = family.load(bench.source, seed)
    if bench.heads is not None and isinstance(model, MultiTaskModel):
        start_from(model, bench.heads)
    found.backbone = describe(bench.source, model.backbone)
    with torch_stream(protocol.name, seed, "adapters"):
        model.attachment = planned.method.attach(model.backbone)
    # Initialised on the CPU and then moved: the same values on every device.
    model.to(bench.device)
    if protocol.compiled is not None:
        model.compile_training(protocol.compiled)
    found.parameters = _count(model, model.attachment, len(family.specs))
    return model


def _count(model: AnyModel | None, attachment: Adapters | None, tasks: int) -> Parameters:
    heads = 0 if model is None else _numbers(model.heads.parameters())
    if attachment is not None:
        count = attachment.parameter_count()
        return Parameters(
            adapter=count.total,
            adapter_closed_form=count.closed_form,
            adapter_shared=count.shared,
            heads=heads,
            base=count.base,
            sites=count.sites,
            tasks=tasks,
            added_by_task=_count_added(attachment),
            mergeable=_can_merge(attachment),
        )
    encoder = [] if model is None else list(model.backbone.parameters())
    # Of full fine-tuning everything trains: it counts as the adapter, and as the base it is compared with.
    trained = _numbers(parameter for parameter in encoder if parameter.requires_grad)
    return Parameters(
        adapter=trained,
        adapter_closed_form=trained,
        adapter_shared=0,
        heads=heads,
        base=_numbers(encoder),
        sites=0,
        tasks=tasks,
        added_by_task=0,
        mergeable=True,
    )


def _count_added(attachment: Adapters) -> int | None:
    """What one more task adds; None of a method without a closed form."""
    if not isinstance(attachment, Attachment):
        return None
    return count_added_by_task(attachment.factory, attachment.sites)


def _can_merge(attachment: Adapters) -> bool | None:
    """Whether the method merges; None of a method that does not say."""
    if not isinstance(attachment, Attachment):
        return None
    return attachment.factory.capabilities.not_mergeable is None


def _numbers(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
