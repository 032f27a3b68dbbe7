"""Time every method beside the bare model and the `peft` package: ``python -m benchmarks.speed``.

A pass of its own, on random weights of the true shapes: speed needs shapes, not weights. All contestants are built
first and then take turns, so that their ratios hold although the machine's speed does not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

# Everything heavy is imported where it is needed: `--help` and wrong flags answer at once.
import tyro
from rich.console import Console

from benchmarks.protocols.protocol import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from benchmarks.records.schema import Provenance
    from benchmarks.reporting.render import Table
    from benchmarks.speed.rows import Row
    from benchmarks.speed.settings import Settings

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

NOTES = (
    "ms: median over the timed rounds. x: median of the ratios to the reference in the same round (95 % bootstrap).",
    "A training step is forward, loss with auxiliary losses and backward. Random weights, no dropout, no padding.",
    "On a processor the memory that a step frees stays in the process while steps are timed: no page faults.",
    "The rows belong to {tasks} tasks in turn; a merged model serves task 0 alone.",
    "frozen: the bare model, its gradient taken to the first layer's input; frozen, forward only: without gradients.",
    "peak MiB: {peak}, above what was there before the step; the frozen weights' {weights:,.0f} MiB come on top.",
    "saved MiB: kept for backward, weights left out.",
    "GFLOP: counted, of matrix products. MFU: the frozen model's operations over time and the device's peak.",
    "kernels: tensor operations counted, views left out: what small steps take time for whatever their size.",
)
GROWTH_NOTES = (
    "Median time of forward, loss and backward. exponent: b of time = a value^b, by least squares on logarithms.",
    "{rows} x {length} tokens of {tasks} tasks where the axis does not say otherwise.",
    "Over tasks: as many tokens in all, in as many rows as the most tasks need.",
    "A method that adapts whole feed-forward networks has one of two layers of the input's width.",
    "The bare layer and the reference know neither experts nor tasks: there, their exponent shows the noise.",
)


@dataclass(frozen=True)
class Options:
    """Time training and inference of methods beside the bare model and the `peft` package's adapter."""

    backbone: str | None = None
    """minilm, t5-base, deberta-v3-base, llama-2-7b, or one linear layer as INxOUT; default: minilm, and 768x768 with
    --grow."""
    methods: str = "all"
    """Comma-separated methods, each with or without @preset; `all` registered ones."""
    fields: str = ""
    """Hyper-parameters over the preset's: name:key=value,..., e.g. name:rank=16,name@preset:kernels=(2, 4)."""
    mode: str = "train,prefill,decode"
    """What to time; decode needs a model that generates."""
    rows: int = 32
    """Sequences per training step."""
    length: int = 64
    """Tokens per sequence."""
    inference_rows: str = "1,16"
    """Batch sizes of prefill and decode."""
    tasks: int = 8
    """Number of tasks the rows belong to."""
    layers: int | None = None
    """Keep only so many layers of the model."""
    sites: str | None = None
    """Comma-separated roles or name ends of the layers to adapt; default: all linear layers of the blocks."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the frozen weights; adapters train in fp32."""
    autocast: bool = True
    """With bf16, run the forward under autocast; without, the reference computes its update in fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    threads: int | None = None
    """Processor threads."""
    compile: bool = False
    """Compile what is called with torch.compile; merged models are left out then."""
    optimiser: bool = False
    """End a training step with a step of AdamW."""
    warmup: int = 3
    """Rounds that do not count."""
    repeats: int = 10
    """Rounds that do."""
    peak_tflops: float | None = None
    """The device's peak at this type in 10^12 operations per second: adds the column MFU."""
    naive: str | None = None
    """MODULE:NAME of a mapping from a method's name to what turns its factory into a naive twin: adds their rows."""
    grow: str | None = None
    """Instead, how the time on one layer grows over experts, rank, length or tasks (comma-separated)."""
    json: Path | None = None
    """Also write every figure to this file."""
    results: Path = Path("results/speed")
    """Folder whose tables/ gets the Markdown."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 if all contestants ran or cannot, 1 if one failed, 2 for wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = tyro.cli(Options, args=words, prog="python -m benchmarks.speed")
    try:
        return _main(options, " ".join(["python -m benchmarks.speed", *words]))
    except UsageError as error:
        _console(stderr=True).print(f"error: {error}")
        return EXIT_USAGE


def _console(*, stderr: bool = False) -> Console:
    # Markdown tables and messages are printed as they are: no markup, no wrapping.
    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)


def _main(options: Options, command: str) -> int:
    import torch
    import transformers

    from benchmarks.plan.options import resolve_device
    from benchmarks.records.provenance import gather
    from benchmarks.speed.hosts import build_host
    from benchmarks.speed.settings import resolve

    settings = resolve(options)
    device = resolve_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    precision = "bf16 autocast" if options.dtype == "bf16" and options.autocast else options.dtype
    provenance = gather(device, precision, command)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    host = build_host(settings.backbone, layers=options.layers, device=device, dtype=dtype)
    made = _grow(options, settings, host) if settings.axes else _compare(options, settings, host)
    return _conclude(options, settings, made, provenance, device)


@dataclass(frozen=True)
class Outcome:
    """What is shown and kept."""

    heading: str
    tables: list[Table]
    notes: tuple[str, ...]
    rows: list[Row]
    figures: dict[str, Any]


def _compare(options: Options, settings: Settings, host: nn.Module) -> Outcome:
    """The tables of all modes and batch sizes."""
    import torch

    from benchmarks.instruments.memory import held, memory_kind
    from benchmarks.speed.contestants import reference_label
    from benchmarks.speed.lineup import line_up
    from benchmarks.speed.rows import Schedule, failed_row, measure_group
    from benchmarks.speed.tables import group_table

    contestants, failures = line_up(host, settings, compiled=options.compile)
    schedule = Schedule(options.warmup, options.repeats)
    groups = []
    for workload in settings.workloads(host):
        there = contestants.of(workload.mode)
        _console(stderr=True).print(f"timing {workload.mode}, {workload.rows} rows: {len(there)} contestants")
        group = measure_group(
            there, host, workload, schedule, reference=reference_label(), peak_tflops=options.peak_tflops
        )
        groups.append(group)
    unbuilt = [failed_row(label, error) for label, error in failures.items()]
    rows = [*unbuilt, *(row for group in groups for row in group.rows)]
    weights = held(host.parameters(), torch.device("cpu")) / 2**20
    kind = memory_kind(next(host.parameters()).device)
    notes = [note.format(tasks=options.tasks, peak=kind, weights=weights) for note in NOTES]
    notes += [f"{row.label}: {row.status}: {row.reason}" for row in unbuilt]
    return Outcome(
        f"Speed of {settings.described}",
        [group_table(group, reference_label()) for group in groups],
        tuple(notes),
        rows,
        {"groups": groups, "not_built": unbuilt},
    )


def _grow(options: Options, settings: Settings, host: nn.Module) -> Outcome:
    """The tables of all axes."""
    from benchmarks.speed.growth import measure_growth
    from benchmarks.speed.rows import Schedule
    from benchmarks.speed.tables import growth_table

    schedule = Schedule(options.warmup, options.repeats)
    tables, rows, figures = [], [], {}
    for axis in settings.axes:
        growth = measure_growth(axis, host, settings.entries, settings.training(), schedule, compiled=options.compile)
        tables.append(growth_table(growth, f"Training step in ms over {axis}"))
        rows += [row for by_value in growth.rows.values() for row in by_value.values()]
        figures[axis] = growth
    notes = tuple(note.format(rows=options.rows, length=options.length, tasks=options.tasks) for note in GROWTH_NOTES)
    return Outcome(f"Growth of the time on {settings.described}", tables, notes, rows, {"growth": figures})


def _conclude(options: Options, settings: Settings, made: Outcome, provenance: Provenance, device: torch.device) -> int:
    """Print, write, choose the exit code."""
    from benchmarks.records.store import replacing
    from benchmarks.speed.tables import as_json, document

    text = document(made.heading, made.tables, made.notes, provenance)
    console = _console()
    console.print(text)
    path = options.results / "tables" / f"{settings.stem}-{device.type}.md"
    with replacing(path) as file:
        file.write(text.encode())
    console.print(f"written: {path}")
    if options.json is not None:
        figures = as_json({"options": options, "provenance": provenance, **made.figures})
        with replacing(options.json) as file:
            file.write((json.dumps(figures, indent=1) + "\n").encode())
        console.print(f"written: {options.json}")
    failed = [row for row in made.rows if row.status not in ("ok", "unsupported")]
    return EXIT_FAILED if failed else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
