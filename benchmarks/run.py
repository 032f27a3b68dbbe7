"""Train every method under identical budgets and write the tables: ``python -m benchmarks.run``.

A finished cell (method x seed) is never computed again; a failing one becomes a row that says why.
"""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

# Everything heavy is imported where it is needed: `--help` and wrong flags answer at once.
from rich.console import Console

from benchmarks.plan.options import Options, cells_at_once, launched_shard, parse_shard, resolve_suite
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.flags import parse_flags

if TYPE_CHECKING:
    import torch

    from benchmarks.backbones.load import BackboneSource
    from benchmarks.cells.cell import Bench
    from benchmarks.cells.pool import Workers
    from benchmarks.plan.part import Part, Rerun
    from benchmarks.plan.study import Study
    from benchmarks.plan.tuning import Tuned
    from benchmarks.protocols.protocol import Suite
    from benchmarks.records.schema import RunRecord
    from benchmarks.records.store import Store

EXIT_OK, EXIT_CELL_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
COMMAND = "python -m benchmarks.run"
MECHANISMS = "mechanisms"
_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 if all cells are ok, 1 if one failed, 2 for wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_flags(Options, words, COMMAND)
    if options.shard is None:
        options = replace(options, shard=launched_shard())
    # Markdown tables and messages are printed as they are: no markup, no wrapping.
    console = Console(highlight=False, markup=False, soft_wrap=True)
    stderr = Console(file=sys.stderr, highlight=False, markup=False, soft_wrap=True)
    try:
        with _as_usage_errors(), _ended_as_by_ctrl_c():
            return _run(options, console, " ".join([COMMAND, *words]))
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
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM ends the command as Ctrl-C does, its workers too: schedulers and `timeout` send it."""
    if threading.current_thread() is not threading.main_thread():  # only there are signals handled
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _as_usage_errors() -> Iterator[None]:
    """Inside, whatever is the user's to mend ends as a message instead of a traceback."""
    try:
        yield
    except (OSError, UsageError):
        raise
    except Exception as error:
        from benchmarks.backbones.load import BackboneUnavailable
        from benchmarks.records.store import RecordError
        from benchmarks.tasks import DataUnavailable, InvalidData
        from moepeft.errors import ConfigError, UnknownMethod

        if isinstance(error, BackboneUnavailable | RecordError | DataUnavailable | InvalidData):
            raise UsageError(str(error)) from error
        if isinstance(error, ConfigError | UnknownMethod):
            raise UsageError(str(error)) from error
        raise


def _run(options: Options, console: Console, command: str) -> int:
    from benchmarks.instruments.messages import library_messages

    if options.suite == MECHANISMS:
        from benchmarks.mechanisms.command import run_suite

        with library_messages(options.results or Path("results") / MECHANISMS):
            return run_suite(options, console, command)
    suite = resolve_suite(options)
    root = options.results or Path("results") / suite.name
    in_the_way = next((path for path in (root, *root.parents) if path.exists() and not path.is_dir()), None)
    if in_the_way is not None:
        raise UsageError(f"--results {root}: {in_the_way} is a file; give a folder")
    with library_messages(root):
        from benchmarks.cells.pool import Workers

        with Workers(cells_at_once(options, 1), root) as workers:
            return _resolve(options, suite, root, console, command, workers).execute()


def _resolve(options: Options, suite: Suite, root: Path, console: Console, command: str, workers: Workers) -> _Command:
    from benchmarks.backbones.device import resolve_device
    from benchmarks.backbones.load import find_backbone
    from benchmarks.instruments.processor import prepare_device
    from benchmarks.plan.study import resolve_study
    from benchmarks.records.store import Store

    source, device = find_backbone(suite.backbone), resolve_device(options.device)
    prepare_device(device)
    store = Store(root)
    study = resolve_study(options, suite, source, device.type, store)
    return _Command(options, study, source, device, store, console, command, workers)


@dataclass(frozen=True, slots=True)
class _Command:
    """One command.

    Attributes:
        options: the flags.
        study: what is compared.
        source: of the backbone.
        device: where to run.
        store: of the reported cells.
        console: for messages.
        command: as it was typed.
        workers: run cells side by side.
        benches: what cells share, by what they are scored on; made when first needed.
    """

    options: Options
    study: Study
    source: BackboneSource
    device: torch.device
    store: Store
    console: Console
    command: str
    workers: Workers
    benches: dict[str, Bench] = field(default_factory=dict)

    def execute(self) -> int:
        """Trials first, if rates are tuned, then the reported cells, then the tables."""
        from benchmarks.plan.part import deal

        suite, options, shard = self.study.suite, self.options, parse_shard(self.options.shard)
        by_method = tuple(self.study.methods) if suite.tuning_rates else None
        tuned = self._tune(shard, by_method)
        if tuned is None:
            return EXIT_INTERRUPTED
        cells = self.study.reported(tuned.rates, tuned.waiting)
        part = deal(cells, self.store, shard=shard, rerun=options.rerun, by_method=by_method)
        if not self._plan_or_run(part, "cells"):
            return EXIT_INTERRUPTED
        if options.plan:
            for name in sorted(tuned.waiting):
                seeds = ", ".join(map(str, suite.seeds))
                self.console.print(f"{name}: seeds {seeds} after its trials, at the best rate")
            return EXIT_OK
        complete = not tuned.waiting and all(self.store.find(planned.cell) for planned in cells)
        return self._conclude(part, complete=complete)

    def _tune(self, shard: tuple[int, int], by_method: tuple[str, ...] | None) -> Tuned | None:
        """Run trials, round by round, until this shard's rates are decided; None if the user stopped it."""
        from benchmarks.plan.part import deal
        from benchmarks.records.trials import trial_store

        store = trial_store(self.store.root)
        # A trial that was made is made, whatever else is to be run again: the rate was chosen by its score.
        rerun: Rerun = "failed" if self.options.rerun == "failed" else "missing"
        while True:
            tuned = self.study.tune(store)
            part = deal(tuned.trials, store, shard=shard, rerun=rerun, by_method=by_method)
            if not tuned.trials or (not part.due and not self.options.plan):
                return tuned
            suite, names = self.study.suite, {one.cell.method for one in tuned.trials}
            if not self._plan_or_run(
                part, "trials", later=[(name, suite.steps) for name in names for _ in suite.seeds]
            ):
                return None
            if self.options.plan:
                return tuned
            rerun = "missing"

    def _plan_or_run(self, part: Part, what: str, later: Sequence[tuple[str, int]] = ()) -> bool:
        """Print what is due of a part, or run it, with `later` to come; False if the user stopped it."""
        if self.options.plan:
            for line in part.describe(what, self.options.shard):
                self.console.print(line)
            return True
        if not part.due:
            return True
        from benchmarks.cells.cell import prepare
        from benchmarks.cells.pool import run_cells

        # Cells that are scored on the same differ in learning rates and steps, not in rows.
        protocol = part.due[0].cell.protocol
        scored_on = protocol.evaluate_on
        # The rows of the reported cells first: what is wrong with one is said before hours of trials.
        wanted = {self.study.suite.evaluate_on: self.study.suite.protocol, scored_on: protocol}
        for name in [name for name in wanted if name not in self.benches]:
            self.benches[name] = prepare(
                self.study.data, wanted[name], self.source, self.device, self.command, self.store.root
            )
        return run_cells(
            part.due,
            self.benches[scored_on],
            part.store,
            self.console,
            self.workers,
            later=later,
        )

    def _name_messages(self) -> Iterator[str]:
        """Where other libraries' messages are, if there are any."""
        from benchmarks.instruments.messages import FILE

        if (self.store.root / FILE).is_file():
            yield f"Warnings and messages of libraries: {self.store.root / FILE}"

    def _conclude(self, part: Part, *, complete: bool) -> int:
        """Print the tables, verify the budgets, choose the exit code."""
        from benchmarks.records.identity import budget_differences, left_behind
        from benchmarks.records.trials import trial_store
        from benchmarks.reporting.build import write_report
        from benchmarks.reporting.page.write import write_page

        store, say = self.store, self.console.print
        closing: list[str] = []
        if complete:
            report = write_report(store.root)
            say(report.markdown)
            closing = [
                *self._name_messages(),
                *report.closing,
                f"The page for a browser: {write_page(store.root, store.root / 'page')}",
            ]
        ran = len(part.due)
        say(f"{ran} of {len(part.mine)} cells were run, {len(part.mine) - ran} were there already; {store.root}")
        if not complete:
            say("cells of other shards are missing: the shard that ends last writes the tables")
        problems = budget_differences([*store.all(), *trial_store(store.root).all()])
        for problem in problems:
            say(f"error: {problem}; run these cells again with --rerun all, trials after deleting their records")
        for record in left_behind(store.all(), [planned.cell for planned in part.cells]):
            say(
                f"{_at_rate(record)} was run before its trials chose another rate: delete "
                f"{store.records_folder}/*-{record.cell.id}.json, or the tables have a row for each rate"
            )
        trials = [record for record in trial_store(store.root).all() if record.cell.method in self.study.methods]
        for record in [record for record in trials if record.status != "ok"]:
            say(f"trial of {_at_rate(record)}: {record.status}: {record.reason}")
        if any(record.status != "ok" for record in trials):
            say("trials that failed count as the worst score; --rerun failed tries them again")
        failed = part.failed()
        for record in failed:
            say(f"{record.cell.method} seed {record.cell.seed}: {record.status}: {record.reason}")
        if failed:
            say("failed cells are kept as rows; --rerun failed runs them again")
        for line in closing:
            say(line)
        return EXIT_CELL_FAILED if problems or failed else EXIT_OK


def _at_rate(record: RunRecord) -> str:
    cell = record.cell
    return f"{cell.method} at {cell.protocol.learning_rate:g}, seed {cell.seed}"


if __name__ == "__main__":
    sys.exit(main())
