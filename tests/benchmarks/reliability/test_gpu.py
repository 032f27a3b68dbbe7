"""The rehearsal of what a GPU is to do, killed in the middle of a stage: the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--stages", "speed-t5-base,study"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--results", str(folder)], cwd=ROOT, env=environment, start_new_session=True)


def written(folder: Path) -> dict[str, int]:
    """File -> when it was written, of the finished stages, tables and cells."""
    files = [*folder.glob("stages/*.json"), *folder.glob("speed/**/*.*"), *folder.glob("study/records/*.json")]
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_a_rehearsal_that_is_killed_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    process = start(tmp_path)
    while not list(tmp_path.glob("study/records/*.json")):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = written(tmp_path)
    assert {Path(name).name for name in before} >= {"speed-t5-base-host.json", "t5-base.json"}
    assert not (tmp_path / "stages" / "study.json").exists()
    assert start(tmp_path).wait() == 0
    after = written(tmp_path)
    assert before.items() <= after.items()
    assert {Path(name).name.partition("-")[0] for name in after} >= {"majority", "head", "lora"}
