"""Run planned cells, one after the other or several at once, each to its record.

Several at once are worker processes that get cell after cell from here, so that a slow cell holds up nobody, and a
process that dies (killed for memory, say) is a row of the table like any other failure. Cells side by side take each
other's cores, or share the GPU: their step times would not compare, so they have no timing pass.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.cells import cell as cells
from benchmarks.cells.cell import Bench
from benchmarks.plan.cells import PlannedCell
from benchmarks.records.provenance import code_state, gather
from benchmarks.records.schema import RunRecord
from benchmarks.records.store import Store

PATIENCE = 5.0  # seconds a worker has to end before it is killed


def run_cells(waiting: Sequence[PlannedCell], bench: Bench, store: Store, console: Console, jobs: int = 1) -> bool:
    """Run cells and print a line for each; False if the user stopped it."""
    if jobs > 1:
        return _Pool(waiting, dataclasses.replace(bench, timed=False), store, console).run(jobs)
    for number, planned in enumerate(waiting, start=1):
        title = f"[{number}/{len(waiting)}] {planned.title}"
        start = time.perf_counter()
        with _progress(title, planned.cell.protocol.steps, console) as on_step:
            record, outcomes = cells.run_cell(planned, bench, on_step)
        store.put(record, outcomes)
        console.print(_line(title, record, start))
        if record.status == "interrupted":
            return False
    return True


def _line(title: str, record: RunRecord, start: float) -> str:
    ending = record.status if record.reason is None else f"{record.status}: {record.reason}"
    return f"{title}: {ending} ({time.perf_counter() - start:.1f} s)"


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


# ---------------------------------------------------------------------- several at once


@dataclass(slots=True)
class _Worker:
    """A process, this end of the pipe to it, and what it is at.

    Attributes:
        process: runs `_work`.
        pipe: cells go out, a message comes back for each that is stored.
        planned: the cell it has.
        before: the record there was of that cell.
        start: when it got the cell.
    """

    process: SpawnProcess
    pipe: Connection[PlannedCell | None, str]
    planned: PlannedCell
    before: RunRecord | None
    start: float


class _Pool:
    """Worker processes on the cells of one run.

    Args:
        waiting: the cells.
        bench: what they share; a copy goes to every worker.
        store: where the workers put their records.
        console: for one line per cell.
    """

    def __init__(self, waiting: Sequence[PlannedCell], bench: Bench, store: Store, console: Console) -> None:
        self._total = len(waiting)
        self._queue = deque(waiting)
        self._bench, self._store, self._console = bench, store, console
        self._workers: list[_Worker] = []
        self._done = 0

    def run(self, jobs: int) -> bool:
        """Run all cells, at most `jobs` at once; False if the user stopped it."""
        # As many threads as the user gave this process, dealt out: with more, the workers only get in each other's way.
        threads = max(1, torch.get_num_threads() // jobs)
        try:
            while self._queue or self._workers:
                while self._queue and len(self._workers) < jobs:
                    self._start(threads)
                for ready in wait([worker.pipe for worker in self._workers]):
                    self._hear(next(worker for worker in self._workers if worker.pipe is ready))
        except KeyboardInterrupt:
            self._console.print("interrupted; the same command goes on where this one stopped")
            return False
        finally:
            self._stop_all()
        return True

    def _start(self, threads: int) -> None:
        # A process forked from one that runs torch's threads, or has CUDA open, would hang or fail.
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, self._bench, self._store.root, threads), daemon=True)
        with _ctrl_c_later():
            process.start()
        there.close()  # the process has the only other end now: when it dies, reading here says so
        planned = self._queue.popleft()
        self._workers.append(_Worker(process, here, planned, self._store.find(planned.cell), time.perf_counter()))
        _send(here, planned)

    def _hear(self, worker: _Worker) -> None:
        """Take the message of a worker, and give it the next cell or let it go."""
        try:
            worker.pipe.recv()
            alive = True
        except (EOFError, ConnectionError):
            alive = False
            worker.process.join(PATIENCE)
        record = self._store.find(worker.planned.cell)
        if not alive and (record is None or record == worker.before):
            record = self._store.put(self._death(worker))
        assert record is not None
        self._done += 1
        self._console.print(_line(f"[{self._done}/{self._total}] {worker.planned.title}", record, worker.start))
        if alive and self._queue:
            worker.planned = self._queue.popleft()
            worker.before, worker.start = self._store.find(worker.planned.cell), time.perf_counter()
            _send(worker.pipe, worker.planned)
            return
        if alive:
            _send(worker.pipe, None)
        self._workers.remove(worker)
        worker.pipe.close()
        worker.process.join(PATIENCE)

    def _death(self, worker: _Worker) -> RunRecord:
        """The record of a cell whose process ended before it could write one."""
        code = worker.process.exitcode
        how = f"ended with exit status {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += ", as happens where memory runs out" if -code == signal.SIGKILL else ""
        bench = self._bench
        return RunRecord(
            cell=worker.planned.cell,
            status="error",
            reason=f"the process that ran it {how}; --rerun failed runs it again",
            sources={task.spec.name: task.source for task in bench.data},
            backbone=None,
            routing=None,
            outcomes=None,
            provenance=gather(bench.device, worker.planned.cell.protocol.precision, bench.command),
        )

    def _stop_all(self) -> None:
        """End what still runs. Its cells have no record: they were neither finished nor did they fail."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        self._workers.clear()


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Inside, Ctrl-C waits; so it does in a process started inside, which has it blocked from the first moment on."""
    resource_tracker.ensure_running()  # else the first process started would start it, which unblocks the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _send(pipe: Connection[PlannedCell | None, str], message: PlannedCell | None) -> None:
    with suppress(ConnectionError):  # it died in between: reading from it says so
        pipe.send(message)


def _work(pipe: Connection[str, PlannedCell | None], bench: Bench, root: Path, threads: int) -> None:
    """What a worker does: cell after cell from the pipe to the store, until there are none or nobody is there."""
    import transformers

    # Ctrl-C reaches all processes of a terminal: the one that started this one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that half-written files are removed
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    code_state()
    store = Store(root)
    try:
        while (planned := pipe.recv()) is not None:
            record, outcomes = cells.run_cell(planned, bench, lambda _: None)
            store.put(record, outcomes)
            pipe.send(record.status)
    except (EOFError, ConnectionError):
        return  # the run that started this process is gone
