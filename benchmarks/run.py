"""Train every method under identical budgets and write the tables: ``python -m benchmarks.run``.

A finished cell (method x seed) is never computed again; a failing one becomes a row that says why.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

# Everything heavy is imported where it is needed: `--help` and wrong flags answer at once.
import tyro
from rich.console import Console

from benchmarks.plan.options import (
    Options,
    launched_shard,
    parse_shard,
    resolve_device,
    resolve_precision,
    resolve_suite,
)
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Protocol, Suite

if TYPE_CHECKING:
    import torch

    from benchmarks.backbones.load import BackboneSource
    from benchmarks.cells.cell import Bench
    from benchmarks.plan.cells import Method, PlannedCell
    from benchmarks.records.schema import RunRecord
    from benchmarks.records.store import Store
    from benchmarks.tasks.base import TaskData

EXIT_OK, EXIT_CELL_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 if all cells are ok, 1 if one failed, 2 for wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = tyro.cli(Options, args=words, prog="python -m benchmarks.run")
    if options.shard is None:
        options = replace(options, shard=launched_shard())
    # Markdown tables and messages are printed as they are: no markup, no wrapping.
    console = Console(highlight=False, markup=False, soft_wrap=True)
    stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        return _main(options, console, " ".join(["python -m benchmarks.run", *words]))
    except UsageError as error:
        stderr.print(f"error: {error}")
        return EXIT_USAGE
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        stderr.print(f"error: {error}; nothing finished is lost: make room, and the same command goes on from there")
        return EXIT_USAGE
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where this one stopped")
        return EXIT_INTERRUPTED


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Inside, whatever is the user's to mend ends as a message instead of a traceback."""
    from benchmarks.backbones.load import BackboneUnavailable
    from benchmarks.records.store import RecordError
    from benchmarks.tasks import DataUnavailable, InvalidData
    from moepeft.errors import ConfigError, UnknownMethod

    try:
        yield
    except (BackboneUnavailable, RecordError, DataUnavailable, InvalidData, ConfigError, UnknownMethod) as error:
        raise UsageError(str(error)) from error


def _main(options: Options, console: Console, command: str) -> int:
    suite = resolve_suite(options)
    with _told_in_one_line():
        return _run(_resolve(options, suite, console, command))


@dataclass(frozen=True, slots=True)
class _Run:
    """Everything that one command resolves to.

    Attributes:
        options: the flags.
        suite: with backbone, precision and target size resolved.
        methods: factories by name, in the size they are to have.
        refusals: by name, why a method cannot be run as asked.
        data: the tasks' rows.
        source: of the backbone.
        device: where to run.
        store: of the reported cells.
        console: for messages.
        command: as it was typed.
    """

    options: Options
    suite: Suite
    methods: dict[str, Method]
    refusals: dict[str, str]
    data: tuple[TaskData, ...]
    source: BackboneSource
    device: torch.device
    store: Store
    console: Console
    command: str


def _resolve(options: Options, suite: Suite, console: Console, command: str) -> _Run:
    from benchmarks.backbones.load import find_backbone
    from benchmarks.families import family_of
    from benchmarks.instruments.processor import prepare_device
    from benchmarks.plan.cells import parse_methods
    from benchmarks.records.store import Store
    from benchmarks.tasks import load_task

    source = find_backbone(suite.backbone)
    methods = parse_methods(options.methods, num_tasks=len(suite.tasks), has_heads=family_of(suite).has_heads)
    refusals: dict[str, str] = {}
    device = resolve_device(options.device)
    prepare_device(device)
    suite = suite.with_overrides(backbone=source.identity, precision=resolve_precision(suite.precision, device))
    if suite.track == "matched":
        from benchmarks.methods.matching import matched_methods

        suite, methods, refusals = matched_methods(suite, methods, source)
    data = tuple(load_task(name, data_dir=options.data_dir) for name in suite.tasks)
    suite = suite.with_overrides(tasks=tuple(task.spec.name for task in data))  # own tasks were paths until here
    store = Store(options.results or Path("results") / suite.name)
    return _Run(options, suite, methods, refusals, data, source, device, store, console, command)


def _run(run: _Run) -> int:
    """Trials first, if rates are tuned, then the reported cells, then the tables."""
    from benchmarks.plan.cells import expand
    from benchmarks.plan.tuning import chosen_rates, trial_cells, tuned_cells
    from benchmarks.records.trials import trial_store

    if not run.suite.tuning_rates:
        return _report_on(
            run, expand(run.suite.protocol, run.methods, run.data, run.suite.seeds, refusals=run.refusals), []
        )

    trials = trial_cells(run.suite, run.methods, run.data, run.refusals)
    store = trial_store(run.store.root)
    # A trial that was made is made, whatever else is to be run again: its score is what the rate was chosen by.
    part = _part_of(run, trials, store, "failed" if run.options.rerun == "failed" else "missing")
    if run.options.plan:
        _print_plan(part, run, "trials")
    elif not _run_all(part, run):
        return EXIT_INTERRUPTED
    rates = chosen_rates(trials, store)
    waiting = {planned.cell.method for planned in trials} - set(rates)
    decided = {name: factory for name, factory in run.methods.items() if name not in waiting}
    return _report_on(run, tuned_cells(run.suite, decided, run.data, rates, run.refusals), sorted(waiting))


def _report_on(run: _Run, cells: Sequence[PlannedCell], undecided: Sequence[str]) -> int:
    """Run the reported cells and write the tables; `undecided` are the methods whose trials are not all there."""
    part = _part_of(run, cells, run.store, run.options.rerun)
    if run.options.plan:
        _print_plan(part, run, "cells")
        for name in undecided:
            run.console.print(
                f"{name}: seeds {', '.join(map(str, run.suite.seeds))} after its trials, at the best rate"
            )
        return EXIT_OK
    if not _run_all(part, run):
        return EXIT_INTERRUPTED
    complete = not undecided and all(run.store.find(planned.cell) for planned in cells)
    return _conclude(part, run, complete=complete)


# ---------------------------------------------------------------------- cells


@dataclass(frozen=True, slots=True)
class _Part:
    """The cells of one store, and which of them are this command's to run.

    Attributes:
        store: where their records are.
        cells: all of them.
        shards: the shard of each.
        mine: those of this command's shard.
        due: those of `mine` that it will run.
    """

    store: Store
    cells: tuple[PlannedCell, ...]
    shards: tuple[int, ...]
    mine: tuple[PlannedCell, ...]
    due: tuple[PlannedCell, ...]


def _part_of(run: _Run, cells: Sequence[PlannedCell], store: Store, rerun: str) -> _Part:
    """Deal the cells to the shards: all of them, not those that are due, as shards may start at different times.

    Where rates are tuned whole methods are dealt: a shard then needs no other one's trials to choose a rate.
    """
    number, shards = parse_shard(run.options.shard)
    order = list(run.methods)
    tuned = bool(run.suite.tuning_rates)
    dealt = tuple((order.index(one.cell.method) if tuned else at) % shards for at, one in enumerate(cells))
    mine = tuple(planned for planned, shard in zip(cells, dealt, strict=True) if shard == number)
    due = tuple(planned for planned in mine if _is_due(store.find(planned.cell), rerun))
    return _Part(store, tuple(cells), dealt, mine, due)


def _is_due(record: RunRecord | None, rerun: str) -> bool:
    if record is None or rerun == "all" or record.status == "interrupted":
        return True
    return rerun == "failed" and record.status != "ok"


def _print_plan(part: _Part, run: _Run, what: str) -> None:
    due = {planned.cell.id for planned in part.due}
    for planned, shard in zip(part.cells, part.shards, strict=True):
        record = part.store.find(planned.cell)
        notes: list[str] = ["missing" if record is None else record.status]
        notes += [f"shard {shard}"] if run.options.shard else []
        notes += ["will run"] if planned.cell.id in due else []
        run.console.print(f"{planned.cell.id}  {planned.name}  seed {planned.cell.seed}  {', '.join(notes)}")
    of = f" (shard {run.options.shard})" if run.options.shard else ""
    run.console.print(f"{len(part.due)} of {len(part.cells)} {what} to run{of}, records in {part.store.records_folder}")


def _run_all(part: _Part, run: _Run) -> bool:
    """Run what is due of a part; False if the user stopped it."""
    if not part.due:
        return True
    from benchmarks.cells.pool import run_cells

    bench = _prepare(run, part.due[0].cell.protocol)
    return run_cells(part.due, bench, part.store, run.console, run.options.jobs)


def _prepare(run: _Run, protocol: Protocol) -> Bench:
    """What all these cells share: they differ in learning rates, not in rows."""
    import transformers

    from benchmarks.backbones.load import load_tokenizer
    from benchmarks.cells.cell import Bench
    from benchmarks.families.batch import tokenise_task
    from benchmarks.records.provenance import code_state

    transformers.utils.logging.disable_progress_bar()
    code_state()  # now: the state of the code that runs, and before tokenisers have started threads
    tokenizer = load_tokenizer(run.source)
    tasks = tuple(tokenise_task(task, tokenizer, protocol) for task in run.data)
    return Bench(run.data, tasks, tokenizer, run.source, run.device, run.command)


def _conclude(part: _Part, run: _Run, *, complete: bool) -> int:
    """Print the tables, verify the budgets, choose the exit code."""
    from benchmarks.records.identity import budget_differences
    from benchmarks.records.trials import trial_store
    from benchmarks.reporting.build import write_report

    store, console = run.store, run.console
    if complete:
        console.print(write_report(store.root))
    ran = len(part.due)
    console.print(f"{ran} of {len(part.mine)} cells were run, {len(part.mine) - ran} were there already; {store.root}")
    if not complete:
        console.print("cells of other shards are missing: the shard that ends last writes the tables")
    problems = budget_differences([*store.all(), *trial_store(store.root).all()])
    for problem in problems:
        console.print(f"error: {problem}; run these cells again with --rerun all")
    failed = [one for one in (store.find(planned.cell) for planned in part.mine) if one and one.status != "ok"]
    for record in failed:
        console.print(f"{record.cell.method} seed {record.cell.seed}: {record.status}: {record.reason}")
    if failed:
        console.print("failed cells are kept as rows; --rerun failed runs them again")
    return EXIT_CELL_FAILED if problems or failed else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
