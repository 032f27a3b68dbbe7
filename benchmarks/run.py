"""Train every method under identical budgets and write the tables: ``python -m benchmarks.run``.

A finished cell (method x seed) is never computed again; a failing one becomes a row that says why.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

# Everything heavy is imported where it is needed: `--help` and wrong flags answer at once.
import tyro
from rich.console import Console

from benchmarks.protocol import Protocol, UsageError, load_protocol

if TYPE_CHECKING:
    import torch

    from benchmarks.cells import Bench, PlannedCell
    from benchmarks.records import RunRecord
    from benchmarks.store import Store

EXIT_OK, EXIT_CELL_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Options:
    """Train methods under one protocol and write tables of parameters, scores and speed."""

    methods: str = "all"
    """Comma-separated methods, each with or without @preset; `all` registered ones; also `full` fine-tuning.
    The rows `majority` and `head` are always there."""
    suite: str = "quick"
    """quick, glue, commonsense, or the path of a protocol in TOML."""
    tasks: str | None = None
    """Comma-separated tasks instead of the suite's own."""
    data_dir: Path | None = None
    """Folder with the real data as parquet files; without it they come from the hub."""
    backbone: str | None = None
    """minilm, deberta-v3-base, tiny-bert, a hub id (with or without @revision) or a local folder."""
    results: Path | None = None
    """Folder for records and tables; default: results/<suite>."""
    seeds: str | None = None
    """Comma-separated seeds, e.g. 0,1,2."""
    steps: int | None = None
    """Optimiser steps."""
    batch_size: int | None = None
    """Rows per step."""
    learning_rate: float | None = None
    """Peak learning rate."""
    eval_rows: int | None = None
    """Score at most this many rows per task, a seeded subset that is the same for all methods."""
    evaluate_on: Literal["reported", "fold"] | None = None
    """fold: score rows cut from the training rows instead of the reported ones, to choose a setting by."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; no part of a cell's identity."""
    precision: Literal["auto", "fp32", "bf16"] | None = None
    """bf16 is autocast; auto takes it where the hardware computes it natively."""
    rerun: Literal["missing", "failed", "all"] = "missing"
    """Which cells to run: those without a finished record, also failed ones, or all."""
    plan: bool = False
    """Print the cells and which are done, then stop."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 if all cells are ok, 1 if one failed, 2 for wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = tyro.cli(Options, args=words, prog="python -m benchmarks.run")
    # Markdown tables and messages are printed as they are: no markup, no wrapping.
    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        return _main(options, console, " ".join(["python -m benchmarks.run", *words]))
    except UsageError as error:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"error: {error}")
        return EXIT_USAGE
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where this one stopped")
        return EXIT_INTERRUPTED


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Inside, whatever is the user's to mend ends as a message instead of a traceback."""
    from benchmarks.backbones import BackboneUnavailable
    from benchmarks.store import RecordError
    from benchmarks.tasks import DataUnavailable, InvalidData
    from moepeft.errors import ConfigError, UnknownMethod

    try:
        yield
    except (BackboneUnavailable, RecordError, DataUnavailable, InvalidData, ConfigError, UnknownMethod) as error:
        raise UsageError(str(error)) from error


def _main(options: Options, console: Console, command: str) -> int:
    protocol = resolve_protocol(options)
    with _told_in_one_line():
        return _run(options, protocol, console, command)


def _run(options: Options, protocol: Protocol, console: Console, command: str) -> int:
    from benchmarks.backbones import find_backbone
    from benchmarks.cells import expand, parse_methods
    from benchmarks.store import Store
    from benchmarks.tasks import load_task

    source = find_backbone(protocol.backbone)
    methods = parse_methods(options.methods, num_tasks=len(protocol.tasks))
    device = resolve_device(options.device)
    protocol = protocol.with_overrides(
        backbone=source.identity, precision=resolve_precision(protocol.precision, device)
    )
    data = tuple(load_task(name, data_dir=options.data_dir) for name in protocol.tasks)
    cells = expand(protocol, methods, data)
    store = Store(options.results or Path("results") / protocol.name)
    waiting = [planned for planned in cells if _is_due(store.find(planned.cell), options.rerun)]
    if options.plan:
        _print_plan(cells, waiting, store, console)
        return EXIT_OK

    if waiting:
        bench = _prepare(protocol, data, source, device, command)
        if not _run_all(waiting, bench, store, console):
            return EXIT_INTERRUPTED
    return _conclude(cells, len(waiting), store, console)


# ---------------------------------------------------------------------- flags


def resolve_protocol(options: Options) -> Protocol:
    """The suite's protocol with the overrides of the command line; raises `UsageError` in one line."""
    protocol = load_protocol(options.suite)
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise UsageError(f"--data-dir {options.data_dir}: no such folder")
    if not any(name.strip() for name in options.methods.split(",")):
        raise UsageError(f"--methods {options.methods!r} names no method; leave it out to run all")
    return protocol.with_overrides(
        tasks=_task_names(options.tasks) if options.tasks is not None else protocol_tasks(protocol),
        seeds=_seeds(options.seeds),
        backbone=options.backbone,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        eval_rows=options.eval_rows,
        evaluate_on=options.evaluate_on,
        precision=options.precision,
    )


def protocol_tasks(protocol: Protocol) -> tuple[str, ...]:
    """The tasks of a protocol, checked to exist."""
    return _known_tasks(protocol.tasks)


def _task_names(text: str) -> tuple[str, ...]:
    return _known_tasks(tuple(name.strip() for name in text.split(",") if name.strip()))


def _known_tasks(names: tuple[str, ...]) -> tuple[str, ...]:
    from benchmarks.tasks import TASKS
    from moepeft.errors import did_you_mean

    for name in names:
        if name not in TASKS:
            raise UsageError(f"there is no task {name!r}.{did_you_mean(name, TASKS)}")
    # One order for all ways of writing the same list: the order is part of what a result depends on.
    return tuple(sorted(names, key=list(TASKS).index))


def _seeds(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise UsageError(f"--seeds {text!r}: give whole numbers from 0 on, separated by commas, e.g. 0,1,2")
    return tuple(map(int, words))


def resolve_device(name: str) -> torch.device:
    """The device to run on; `auto` takes the accelerator if there is one."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device; leave the flag out to run on the CPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` takes bf16 where it is native, and fp32 where it would be emulated."""
    if name != "auto":
        return name
    import torch

    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


# ---------------------------------------------------------------------- cells


def _is_due(record: RunRecord | None, rerun: str) -> bool:
    if record is None or rerun == "all" or record.status == "interrupted":
        return True
    return rerun == "failed" and record.status != "ok"


def _print_plan(cells: Sequence[PlannedCell], waiting: Sequence[PlannedCell], store: Store, console: Console) -> None:
    due = {planned.cell.id for planned in waiting}
    for planned in cells:
        record = store.find(planned.cell)
        state = "missing" if record is None else record.status
        note = ", will run" if planned.cell.id in due else ""
        console.print(f"{planned.cell.id}  {planned.cell.method}  seed {planned.cell.seed}  {state}{note}")
    console.print(f"{len(waiting)} of {len(cells)} cells to run, records in {store.root / 'records'}")


def _prepare(protocol: Protocol, data: Any, source: Any, device: torch.device, command: str) -> Bench:
    import transformers

    from benchmarks.backbones import load_tokenizer
    from benchmarks.cells import Bench
    from benchmarks.data import tokenise_task
    from benchmarks.provenance import code_state

    transformers.utils.logging.disable_progress_bar()
    code_state()  # now: the state of the code that runs, and before tokenisers have started threads
    tokenizer = load_tokenizer(source)
    tasks = tuple(tokenise_task(task, tokenizer, protocol) for task in data)
    return Bench(protocol, data, tasks, tokenizer, source, device, command)


def _run_all(waiting: Sequence[PlannedCell], bench: Bench, store: Store, console: Console) -> bool:
    """Run cell after cell; False if the user stopped it."""
    from benchmarks.cells import run_cell

    for number, planned in enumerate(waiting, start=1):
        title = f"[{number}/{len(waiting)}] {planned.cell.method} seed {planned.cell.seed}"
        start = time.perf_counter()
        with _progress(title, bench.protocol.steps, console) as on_step:
            record, outcomes = run_cell(planned, bench, on_step)
        store.put(record, outcomes)
        ending = record.status if record.reason is None else f"{record.status}: {record.reason}"
        console.print(f"{title}: {ending} ({time.perf_counter() - start:.1f} s)")
        if record.status == "interrupted":
            return False
    return True


@contextmanager
def _progress(title: str, steps: int, console: Console) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; nothing where output goes to a file, which gets one line per finished cell."""
    if not console.is_terminal:
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=steps)
        yield lambda step: bar.update(task, completed=step)


def _conclude(cells: Sequence[PlannedCell], ran: int, store: Store, console: Console) -> int:
    """Print the tables, verify the budgets, choose the exit code."""
    from benchmarks.cells import budget_differences
    from benchmarks.report import write_report

    console.print(write_report(store.root))
    console.print(f"{ran} of {len(cells)} cells were run, {len(cells) - ran} were there already; {store.root}")
    problems = budget_differences(store.all())
    for problem in problems:
        console.print(f"error: {problem}; run these cells again with --rerun all")
    failed = [record for record in (store.find(planned.cell) for planned in cells) if record and record.status != "ok"]
    for record in failed:
        console.print(f"{record.cell.method} seed {record.cell.seed}: {record.status}: {record.reason}")
    if failed:
        console.print("failed cells are kept as rows; --rerun failed runs them again")
    return EXIT_CELL_FAILED if problems or failed else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
