"""One call: it runs what is not done until its time is over, and leaves the rest to the next one."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
from pydantic import BaseModel, ValidationError
from rich.console import Console

from benchmarks.gpu.stages import Stage
from benchmarks.protocols.errors import UsageError

EXIT_DONE, EXIT_FAILED, EXIT_MORE = 0, 1, 75
MOST_BYTES = 64 * 2**20
# Seconds from the request to end until a stage is killed. A cell that is asked to end writes its record.
GRACE = 20
_OFFLINE = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")


class Ended(BaseModel):
    """How a stage ended, as its file in the folder `stages` says."""

    command: str
    exit_code: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the command.

    Attributes:
        folder: where everything is written.
        seconds: the time that the call has.
        lock: a file that stays locked while the call or a stage of the call runs.
        console: for a line per stage.
    """

    folder: Path
    seconds: float
    lock: IO[bytes]
    console: Console

    def work_off(self, stages: Sequence[Stage]) -> int:
        """Run what is not done until the time is over; the exit code. What failed before comes last.

        Raises:
            UsageError: what is written is larger than `MOST_BYTES`.
        """
        end = time.monotonic() + self.seconds
        waits, failed, first = False, False, True
        for stage in sorted(stages, key=self._has_failed):
            require_small(self.folder)
            if self._is_done(stage):
                self.console.print(f"{stage.name}: done before")
                continue
            left = end - time.monotonic()
            if left <= 0:
                self.console.print(f"{stage.name}: waits for the next call")
                waits = True
                continue
            ended = self._run(stage, left)
            if ended is None and not (first and not stage.resumes):
                self.console.print(f"{stage.name}: stopped, the time is over; the same command goes on")
                waits = True
            else:
                failed |= not self._conclude(stage, ended)
            first = False
        require_small(self.folder)
        return EXIT_MORE if waits else EXIT_FAILED if failed else EXIT_DONE

    def _run(self, stage: Stage, seconds: float) -> Ended | None:
        """Run a stage to its end; None if `seconds` were not enough."""
        log = self._log(stage)
        self.console.print(f"{stage.name}: runs; {log}")
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen(  # noqa: S603 - commands of this module
                [sys.executable, *stage.words, *(stage.again if self._has_failed(stage) else ())],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_OFFLINE},
                pass_fds=(self.lock.fileno(),),
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                end_tree(process)
        return Ended(command=stage.command, exit_code=code, seconds=round(time.monotonic() - start, 1))

    def _conclude(self, stage: Stage, ended: Ended | None) -> bool:
        """Keep and say how a stage ended; whether it is done."""
        from benchmarks.records.store import replacing

        if ended is None:
            why = f"failed: it needs more than a whole call of {self.seconds / 60:g} minutes; give --minutes"
            ended = Ended(command=stage.command, exit_code=EXIT_MORE, seconds=self.seconds)
        else:
            why = f"failed with exit code {ended.exit_code}; {self._log(stage)}"
        with replacing(self._path(stage)) as file:
            file.write(ended.model_dump_json(indent=1).encode())
        done = self._is_done(stage)
        self.console.print(f"{stage.name}: {f'done in {ended.seconds:.0f} s' if done else why}")
        return done

    def _is_done(self, stage: Stage) -> bool:
        ended = self._ended(stage)
        return ended is not None and ended.exit_code == 0 and stage.output.exists()

    def _has_failed(self, stage: Stage) -> bool:
        ended = self._ended(stage)
        return ended is not None and ended.exit_code != 0

    def _ended(self, stage: Stage) -> Ended | None:
        """How this very command ended; None if it did not, or if its file is damaged: it runs again."""
        path = self._path(stage)
        try:
            ended = Ended.model_validate_json(path.read_bytes()) if path.exists() else None
        except ValidationError:
            return None
        return ended if ended is not None and ended.command == stage.command else None

    def _path(self, stage: Stage) -> Path:
        return self.folder / "stages" / f"{stage.name}.json"

    def _log(self, stage: Stage) -> Path:
        return self.folder / "stages" / f"{stage.name}.log"


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end as Ctrl-C does, then kill whatever is left of it and of its children."""
    if process.poll() is not None:
        return
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in psutil.wait_procs(tree, timeout=1)[1]:
        child.kill()
    psutil.wait_procs(tree)


def require_small(folder: Path) -> None:
    """Refuse a folder that would not fit where results are taken along.

    Raises:
        UsageError: it is larger than `MOST_BYTES`.
    """
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        raise UsageError(
            f"{folder} has {total / 2**20:.0f} MiB, at most {MOST_BYTES // 2**20} can be taken along; "
            f"delete what is not needed, {largest} first, with {sizes[largest] / 2**20:.0f} MiB"
        )


@contextmanager
def only_call(folder: Path) -> Iterator[IO[bytes]]:
    """The file that says that a call works in this folder; raises `UsageError` while another one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another call works in {folder}; wait until it has ended") from error
        yield file
