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
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import cast

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


def run_cells(
    waiting: Sequence[PlannedCell],
    bench: Bench,
    store: Store,
    console: Console,
    *,
    jobs: int = 1,
    later: Iterable[Work] = (),
) -> bool:
    """Run cells and print a line for each; False if the user stopped it.

    Args:
        waiting: the cells.
        bench: what they share.
        store: gets their records.
        console: for the lines.
        jobs: cells at once.
        later: what the command will run after them; the time left counts it.
    """
    forecast = Forecast([*map(work_of, waiting), *later], jobs)
    if jobs > 1:
        _run_beside(waiting, dataclasses.replace(bench, timed=False), store, console, forecast, jobs)
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
    waiting: Sequence[PlannedCell], bench: Bench, store: Store, console: Console, forecast: Forecast, jobs: int
) -> None:
    """Run cells in worker processes, at most `jobs` at once.

    Raises:
        KeyboardInterrupt: the user stopped it.
    """
    before = {planned.cell.id: store.find(planned.cell) for planned in waiting}
    # As many threads as the user gave this process, dealt out: with more, the workers only get in each other's way.
    threads = max(1, torch.get_num_threads() // jobs)
    shared = _write_shared(_Shared(bench, store, threads))
    # A process forked from one that runs torch's threads, or has CUDA open, would hang or fail.
    pool = ProcessPool(
        min(jobs, len(waiting)),
        initializer=_enter,
        initargs=(shared, store.root),
        context=multiprocessing.get_context("spawn"),
    )
    try:
        with _ctrl_c_later():
            futures: dict[Future[float], PlannedCell] = {
                pool.schedule(_work, args=[planned]): planned for planned in waiting
            }
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
        # After Ctrl-C the cells that ran have no record: they were neither finished nor did they fail.
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()
        shared.unlink(missing_ok=True)


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
    """What a worker process needs for every cell."""

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


_shared: _Shared | Exception | None = None


def _enter(path: Path, root: Path) -> None:
    """What a worker does once. A pool starts a worker that raises here again and again: `_work` raises it instead."""
    global _shared  # noqa: PLW0603 - a process of its own
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that half-written files are removed
    send_messages(root)
    try:
        _shared = _read_shared(path)
    except Exception as error:
        _shared = error


def _read_shared(path: Path) -> _Shared:
    import transformers

    shared = cast(_Shared, pickle.loads(path.read_bytes()))  # noqa: S301 - written by the process that started this one
    torch.set_num_threads(shared.threads)
    prepare_device(shared.bench.device)
    transformers.utils.logging.disable_progress_bar()
    code_state()
    return shared


def _work(planned: PlannedCell) -> float:
    """Run one cell to its record; seconds that it took."""
    if isinstance(_shared, Exception):
        raise _shared
    assert _shared is not None
    start = time.perf_counter()
    try:
        _shared.store.put(*cells.run_cell(planned, _shared.bench, lambda *_: None))
    except SystemExit:
        os._exit(1)  # the pool would take the exception for the task's result and hand out the next one
    return time.perf_counter() - start
