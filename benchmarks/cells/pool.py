"""Run planned cells, one after the other or several at once, each to its record.

Several at once run in the worker processes of a pool. A process that dies, for want of memory say, is a row of the
table like any other failure, and the other cells go on. Cells side by side take each other's cores, or share the GPU:
their step times would not compare, so they have no timing pass.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Self, cast

import torch
from pebble import ProcessExpired, ProcessPool
from rich.console import Console

from benchmarks.cells import cell as cells
from benchmarks.cells.cell import Bench, OnStep
from benchmarks.cells.forecast import Forecast, Work, show_left, work_of
from benchmarks.instruments.messages import send_messages
from benchmarks.instruments.processor import prepare_device
from benchmarks.plan.cells import PlannedCell
from benchmarks.records.provenance import code_state, gather
from benchmarks.records.schema import RunRecord
from benchmarks.records.store import Store


class Workers:
    """Processes that run cells side by side, from the first round of a command to its last: a start takes many seconds.

    A context, whose end stops them. Inside, Ctrl-C leaves the cells that ran without a record: they were neither
    finished nor did they fail.

    Args:
        jobs: cells at once; with one there are no workers.
        root: the results folder; what libraries say in a worker goes to a file there.
    """

    def __init__(self, jobs: int, root: Path) -> None:
        self.jobs, self._root = jobs, root
        self._pool: ProcessPool | None = None
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all workers, whatever they do; the next cells get new ones."""
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()
            self._pool = None

    def schedule(self, waiting: Sequence[PlannedCell], shared: Path) -> dict[Future[float], PlannedCell]:
        """Hand out cells, with what they share in a file; the seconds that each will have taken."""
        size = min(self.jobs, len(waiting))
        if size > self._size:
            self.stop()
            self._size = size
            # A process forked from one that runs torch's threads, or has CUDA open, would hang or fail.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(size, initializer=_enter, initargs=(self._root,), context=context)
        assert self._pool is not None
        with _ctrl_c_later():
            return {self._pool.schedule(_work, args=[planned, shared]): planned for planned in waiting}


def run_cells(
    waiting: Sequence[PlannedCell],
    bench: Bench,
    store: Store,
    console: Console,
    workers: Workers,
    *,
    later: Iterable[Work] = (),
) -> bool:
    """Run cells and print a line for each; False if the user stopped it.

    Args:
        waiting: the cells.
        bench: what they share.
        store: gets their records.
        console: for the lines.
        workers: run them, unless there is one cell at once.
        later: what the command will run after them; the time left counts it.
    """
    forecast = Forecast([*map(work_of, waiting), *later], workers.jobs)
    if workers.jobs > 1:
        _run_beside(waiting, dataclasses.replace(bench, timed=False), store, console, forecast, workers)
        return True
    for number, planned in enumerate(waiting, start=1):
        title = f"[{number}/{len(waiting)}] {planned.title}"
        start = time.perf_counter()
        with _progress(title, planned, console, forecast) as on_step:
            record, outcomes = cells.run_cell(planned, bench, on_step)
        store.put(record, outcomes)
        seconds = time.perf_counter() - start
        forecast.note(planned, seconds)
        console.print(_line(title, record, seconds, forecast))
        if record.status == "interrupted":
            return False
    return True


def _line(title: str, record: RunRecord, seconds: float | None, forecast: Forecast) -> str:
    """A cell that ended: how, its steps and last loss, its seconds, and the time left for all."""
    facts = [record.status if record.reason is None else f"{record.status}: {record.reason}"]
    if record.curve:
        last = record.curve[-1]
        facts.append(f"{last.step} steps, loss {last.losses['task']:.3f}")
    facts += [] if seconds is None else [f"{seconds:.1f} s"]
    return f"{title}: {', '.join(facts)}; {show_left(forecast.find_left())}"


@contextmanager
def _progress(title: str, planned: PlannedCell, console: Console, forecast: Forecast) -> Iterator[OnStep]:
    """A bar on a terminal; nothing where output goes to a file, which gets one line per finished cell."""
    if not console.is_terminal:
        yield lambda *_: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}", markup=False),
    )
    start = time.perf_counter()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=planned.cell.protocol.steps, said="")

        def on_step(step: int, loss: float | None) -> None:
            left = show_left(forecast.find_left(planned, step, time.perf_counter() - start))
            bar.update(task, completed=step, said=left if loss is None else f"loss {loss:.3f}, {left}")

        yield on_step


# ---------------------------------------------------------------------- several at once


def _run_beside(
    waiting: Sequence[PlannedCell],
    bench: Bench,
    store: Store,
    console: Console,
    forecast: Forecast,
    workers: Workers,
) -> None:
    """Run cells in worker processes, at most `Workers.jobs` at once.

    Raises:
        KeyboardInterrupt: the user stopped it.
    """
    before = {planned.cell.id: store.find(planned.cell) for planned in waiting}
    # As many threads as the user gave this process, dealt out: with more, the workers only get in each other's way.
    shared = _write_shared(_Shared(bench, store, max(1, torch.get_num_threads() // workers.jobs)))
    try:
        futures = workers.schedule(waiting, shared)
        for number, future in enumerate(as_completed(futures), start=1):
            planned, seconds = futures[future], _outcome(future)
            record = store.find(planned.cell)
            if isinstance(seconds, ProcessExpired) and (record is None or record == before[planned.cell.id]):
                record = store.put(_death(planned, bench, seconds.exitcode))
            assert record is not None
            took = None if isinstance(seconds, ProcessExpired) else seconds
            forecast.note(planned, took or 0.0)
            console.print(_line(f"[{number}/{len(waiting)}] {planned.title}", record, took, forecast))
    finally:
        shared.unlink()


def _outcome(future: Future[float]) -> float | ProcessExpired:
    """Seconds that the cell took, or the death of its process; raises what the worker raised, e.g. a full disk."""
    try:
        return future.result()
    except ProcessExpired as death:
        return death


def _death(planned: PlannedCell, bench: Bench, code: int | None) -> RunRecord:
    """The record of a cell whose process ended before it could write one."""
    how = f"ended with exit status {code}"
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        how += ", as happens where memory runs out" if -code == signal.SIGKILL else ""
    return RunRecord(
        cell=planned.cell,
        status="error",
        reason=f"the process that ran it {how}; --rerun failed runs it again",
        sources=bench.sources,
        backbone=None,
        routing=None,
        swapped=None,
        outcomes=None,
        provenance=gather(bench.device, planned.cell.protocol.precision, bench.command),
    )


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Inside, Ctrl-C waits; processes and threads started inside have it blocked from the first moment on."""
    resource_tracker.ensure_running()  # else the first process started would start it, which unblocks the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@dataclass(frozen=True, slots=True)
class _Shared:
    """What a worker needs for the cells of a round."""

    bench: Bench
    store: Store
    threads: int


def _write_shared(shared: _Shared) -> Path:
    """A file for the workers to read.

    Arguments of a process go through a pipe. If they are larger than its buffer, the next process is started only when
    this one has imported torch and reads them: many workers would begin one after the other.
    """
    with tempfile.NamedTemporaryFile(prefix="moepeft-", suffix=".pickle", delete=False) as file:
        pickle.dump(shared, file)
    return Path(file.name)


def _enter(root: Path) -> None:
    """What a worker does once. Nothing here may fail: a pool starts a worker that does again and again."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that half-written files are removed
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    send_messages(root)


def _end_with_the_command() -> None:
    """End this process when the one that started it is gone: nobody would stop a worker whose command was killed."""
    command = multiprocessing.parent_process()
    assert command is not None
    command.join()
    os._exit(1)


@lru_cache(maxsize=1)
def _read_shared(path: Path) -> _Shared:
    """What the cells of a round share, read once by every worker."""
    import transformers

    shared = cast(_Shared, pickle.loads(path.read_bytes()))  # noqa: S301 - written by the process that started this one
    torch.set_num_threads(shared.threads)
    prepare_device(shared.bench.device)
    transformers.utils.logging.disable_progress_bar()
    code_state()
    return shared


def _work(planned: PlannedCell, path: Path) -> float:
    """Run one cell to its record; seconds that it took."""
    shared = _read_shared(path)
    start = time.perf_counter()
    try:
        shared.store.put(*cells.run_cell(planned, shared.bench, lambda *_: None))
    except SystemExit:
        os._exit(1)  # the pool would take the exception for the task's result and hand out the next one
    return time.perf_counter() - start
