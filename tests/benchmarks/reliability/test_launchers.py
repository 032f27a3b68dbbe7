"""Several processes through other people's launchers: accelerate, and submitit's executor for one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.records.store import Store
from tests.benchmarks.end_to_end.test_run import PROTOCOL

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("train_with_trainer.py")


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_accelerate_launch_trains_as_one_process_does(tmp_path: Path) -> None:
    """AdapterTrainer in two processes with half of every batch each, its balance loss over both halves."""
    pytest.importorskip("accelerate")
    # Its flag --cpu starts several processes through MPI only; this one does so through torch, and the script says CPU.
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    more = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    run(tmp_path, sys.executable, *launch, *more, str(SCRIPT), "two", "2")
    run(tmp_path, sys.executable, str(SCRIPT), "one", "4")
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    start = load_file(tmp_path / "start" / "adapter.safetensors")
    assert one.keys() == two.keys()
    moved = 0.0
    for name, value in one.items():
        assert (value - two[name]).abs().max() < 1e-6, name
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3


@pytest.mark.exhaustive
def test_accelerate_launch_deals_the_cells_of_the_runner(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "tiny.toml").write_text(PROTOCOL)
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    more = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "--module")
    flags = ("--suite", "tiny.toml", "--results", "results", "--device", "cpu", "--methods", "lora")
    out = run(tmp_path, sys.executable, *launch, *more, "benchmarks.run", *flags)
    records = Store(tmp_path / "results").all()
    assert {one.cell.method: one.status for one in records} == {"majority": "ok", "head": "ok", "lora": "ok"}
    assert sorted(line.split()[0] for line in out.splitlines() if "cells were run" in line) == ["1", "2"]
    assert "lora" in (tmp_path / "results" / "tables" / "scores.md").read_text()


def test_submitit_deals_the_cells_to_jobs(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    (tmp_path / "tiny.toml").write_text(PROTOCOL)
    flags = ["--suite", "tiny.toml", "--results", "results", "--device", "cpu", "--methods", "lora"]
    fan_out = [sys.executable, str(ROOT / "examples" / "slurm_fan_out.py"), "--cluster", "local", "--logs", "logs"]
    run(tmp_path, *fan_out, "--shards", "2", "--", *flags)
    records = Store(tmp_path / "results").all()
    assert {one.cell.method: one.status for one in records} == {"majority": "ok", "head": "ok", "lora": "ok"}
    assert {one.provenance.command.split()[-1] for one in records} == {"0/2", "1/2"}
    scores = (tmp_path / "results" / "tables" / "scores.md").read_text()
    assert all(method in scores for method in ("majority", "head", "lora"))
