"""The first run as a new user sees it: what is printed, line by line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.end_to_end.test_run import PROTOCOL

ROOT = Path(__file__).resolve().parents[3]
CELL = r"\[{number}/5\] {name} seed 0: ok{trained}, \d+\.\d s; (time left unknown|\d+:\d\d left)"
TRAINED = r", 6 steps, loss \d+\.\d{3}"


@pytest.mark.slow
def test_every_line_of_the_first_run_is_the_command_s_own(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(PROTOCOL)
    flags = ["--suite", "tiny.toml", "--methods", "lora,ept,peft:dora", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    names = ["majority", "head", "lora", "ept", "peft:dora"]
    for number, (name, line) in enumerate(zip(names, lines, strict=False), start=1):
        trained = "" if name == "majority" else TRAINED
        assert re.fullmatch(CELL.format(number=number, name=name, trained=trained), line), line
    assert lines[len(names) - 1].endswith("; 0:00 left")

    headings = [line for line in lines if line.startswith("### ")]
    assert headings[-1].startswith("### Compared with ")
    compared = done.stdout.partition(headings[-1])[2].split("\n\n")[1].splitlines()[2:]
    assert {row.split("|")[1].strip() for row in compared} >= {"head"}
    assert len(compared) == 3  # three methods and the heads, one of them the reference

    tables = lines[len(names) : next(at for at, line in enumerate(lines) if line.startswith("5 of 5 cells"))]
    assert [line for line in tables if line and not line.startswith(("#", "|", "- "))] == []
    assert "1 seed" in lines[-2]
    page = tmp_path / re.fullmatch(r"The page for a browser: (\S+)", lines[-1])[1]
    assert page.is_file()
    assert (page.parent / "data.js").stat().st_size > 1000
