"""What the machine may do to ``python -m benchmarks.run``: whatever was finished is kept, the same command goes on."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.records.schema import RunRecord
from benchmarks.records.store import Store
from tests.benchmarks.end_to_end.test_run import PROTOCOL, files
from tests.benchmarks.reliability.hostile_method import KILL_AT

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]


class Bench:
    """The command in processes of their own, with the small protocol and a hostile method installed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, folder / "results"
        (folder / "tiny.toml").write_text(PROTOCOL)
        info = folder / "packages" / "hostile-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hostile\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            "[moepeft.methods]\nhostile = tests.benchmarks.reliability.hostile_method:Hostile\n"
        )

    def start(self, methods: str, *flags: str, kill_at: str = "", limit: int | None = None) -> subprocess.Popen[str]:
        words = ["--suite", "tiny.toml", "--results", str(self.results), "--device", "cpu", "--methods", methods]
        path = os.pathsep.join((str(ROOT), str(self.folder / "packages")))
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.run", *words, *flags],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", KILL_AT: kill_at},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if limit is not None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        return process

    def run(self, methods: str, *flags: str, kill_at: str = "", limit: int | None = None) -> tuple[int, str]:
        process = self.start(methods, *flags, kill_at=kill_at, limit=limit)
        printed, _ = process.communicate(timeout=300)
        return process.returncode, printed

    def records(self) -> dict[str, RunRecord]:
        return {one.cell.method: one for one in Store(self.results).all()}

    def statuses(self) -> dict[str, str]:
        return {name: one.status for name, one in self.records().items()}

    def assert_whole(self) -> None:
        """Every record is valid, has its outcomes, and there is nothing else."""
        store = Store(self.results)
        named = set()
        for record in store.all():
            if record.outcomes is not None:
                assert len(store.outcomes(record))
                named.add(record.outcomes)
        assert {path.name for path in (self.results / "outcomes").iterdir()} == named


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(bench: Bench) -> None:
    process = bench.start("hostile", "--steps", "300")
    until(lambda: list(bench.results.glob("records/head-*.json")), process)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    before = files(bench.results / "records")
    assert {name.split("-")[0] for name in before} <= {"majority", "head", "hostile"}
    assert {status for name, status in bench.statuses().items() if name != "hostile"} == {"ok"}
    bench.assert_whole()

    assert bench.run("hostile", "--steps", "300")[0] == 0
    after = files(bench.results / "records")
    kept = [name for name in before if not name.startswith("hostile")]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert bench.statuses() == {"majority": "ok", "head": "ok", "hostile": "ok"}


@pytest.mark.parametrize("written", ["1", "2"], ids=["outcomes", "record"])
def test_killed_in_the_middle_of_writing_a_file(written: str, bench: Bench) -> None:
    assert bench.run("head")[0] == 0
    before = files(bench.results / "records")
    code, printed = bench.run("hostile", kill_at=written)
    assert code == -signal.SIGKILL, printed
    assert files(bench.results / "records").keys() >= before.keys()
    assert list(bench.results.rglob("*.tmp"))  # it did die in the middle
    assert bench.statuses() == {"majority": "ok", "head": "ok"}

    assert bench.run("hostile")[0] == 0
    assert bench.statuses() == {"majority": "ok", "head": "ok", "hostile": "ok"}
    after = files(bench.results / "records")
    assert {name: after[name] for name in before} == before


def test_a_disk_without_room_loses_nothing_that_was_finished(bench: Bench) -> None:
    assert bench.run("head")[0] == 0
    before = files(bench.results / "records")
    code, printed = bench.run("hostile", limit=1024)  # bytes per file
    assert code not in (0, 130), printed
    assert os.strerror(errno.EFBIG) in printed
    assert "Traceback" not in printed
    assert not list(bench.results.rglob("*.tmp"))
    assert files(bench.results / "records") == before
    assert bench.run("hostile")[0] == 0
    assert bench.statuses() == {"majority": "ok", "head": "ok", "hostile": "ok"}
    after = files(bench.results / "records")
    assert {name: after[name] for name in before} == before
    bench.assert_whole()


def test_out_of_memory_and_nan_are_rows_and_the_next_method_runs(bench: Bench) -> None:
    code, printed = bench.run("hostile@oom,hostile@nan,hostile")
    assert code == 1, printed
    assert bench.statuses() == {
        "majority": "ok",
        "head": "ok",
        "hostile@oom": "oom",
        "hostile@nan": "diverged",
        "hostile": "ok",
    }
    records = bench.records()
    assert "20.00 GiB" in (records["hostile@oom"].reason or "")
    assert "since step 3" in (records["hostile@nan"].reason or "")
    assert records["hostile@nan"].scores == records["hostile@oom"].scores == {}
    bench.assert_whole()


def test_two_runs_into_one_folder_at_the_same_time(bench: Bench) -> None:
    """Of the very same cells, all of them run again: the worst case, each replaces what the other has written."""
    assert bench.run("hostile,hostile@oom")[0] == 1
    both = [bench.start("hostile,hostile@oom", "--rerun", "all") for _ in range(2)]
    for process in both:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 1, printed  # the row that ran out of memory
        assert "error:" not in printed
    assert bench.statuses() == {"majority": "ok", "head": "ok", "hostile": "ok", "hostile@oom": "oom"}
    assert not list(bench.results.rglob("*.tmp"))
    bench.assert_whole()
