"""Tuned and matched runs, shards, and cells side by side: the command from flags to records on a random BERT."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from benchmarks.cells import cell, pool
from benchmarks.protocols.errors import UsageError
from benchmarks.records.schema import RunRecord
from benchmarks.records.store import Store
from benchmarks.run import main
from moepeft import registry
from moepeft.methods.lora import LoRA
from moepeft.protocols import LinearSite

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[3]

PROTOCOL = """
tasks = ["q_sst2", "q_stsb"]
backbone = "tiny-bert"
steps = 4
batch_size = 4
train_rows = 40
eval_rows = 8
fold_rows = 8
max_length = 32
precision = "fp32"
reference = "lora"
[timing]
warmup = 1
repeats = 2
rows = 4
length = 8
"""


class Deadly(nn.Module):
    """An adapter that takes its whole process along, as the kernel does where memory runs out."""

    def forward(self, x: Any, base: Any, ctx: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class Killer(LoRA):
    """A method of such adapters."""

    name: ClassVar[str] = "killer"

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        adapter = Deadly()
        adapter.weight = nn.Parameter(torch.zeros(1))
        return adapter


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command on the small protocol, into tmp_path/results."""
    (tmp_path / "tiny.toml").write_text(PROTOCOL)
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> int:
        return main(["--suite", "tiny.toml", "--results", "results", "--device", "cpu", *flags])

    return run


def records(root: Path = Path("results")) -> dict[str, RunRecord]:
    return {f"{one.cell.method}/{one.cell.seed}": one for one in Store(root).all()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def alive(group: int) -> list[str]:
    """Processes of a group, those apart that have ended and wait for their parent to notice."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = path.read_text().rsplit(")", 1)
        except OSError:
            continue  # it ended meanwhile
        state, _, its_group = fields.split()[:3]
        if int(its_group) == group and state not in "ZX":
            found.append(name)
    return found


# ---------------------------------------------------------------------- tuned and matched


@pytest.mark.slow
def test_the_rows_of_the_report_are_read_before_the_first_trial(bench, monkeypatch):
    """A question that is too long ended a study after hours of trials, none of which it was in."""
    read = []

    def refuse(data, protocol, *_: Any) -> None:
        read.append(protocol.evaluate_on)
        raise UsageError("task x, row 231: raise max_length")

    monkeypatch.setattr(cell, "prepare", refuse)
    assert bench("--methods", "lora", "--tune", "1e-3,1e-2", "--tune-steps", "2") == 2
    assert read == ["reported"]
    assert not Path("results/tuning").exists()


@pytest.mark.slow
def test_a_tuned_run_tries_chooses_reports_and_does_nothing_twice(bench, capsys):
    flags = ("--methods", "lora", "--tune", "1e-3,1e-2", "--tune-steps", "2")
    assert bench(*flags, "--plan") == 0
    plan = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in plan[:4]] == [
        f"{method} trial at {rate}  seed 1000  missing, will run"
        for method in ("head", "lora")
        for rate in (0.001, 0.01)
    ]
    assert plan[4].startswith("4 of 4 trials to run")
    assert plan[-2:] == [f"{name}: seeds 0 after its trials, at the best rate" for name in ("head", "lora")]
    assert not Path("results").exists()

    assert bench(*flags) == 0
    printed = capsys.readouterr().out
    assert "Tuning of the learning rate (tiny)" in printed
    trials = Store(Path("results/tuning")).all()
    assert len(trials) == 4
    for one in trials:
        assert (one.status, one.budget.steps, one.timing.train_step) == ("ok", 2, None)
        assert {score.rows for score in one.scores.values()} == {8}
    found = records()
    assert set(found) == {"majority/0", "head/0", "lora/0"}
    for name in ("head", "lora"):
        own = [one for one in trials if one.cell.method == name]
        means = {
            one.cell.protocol.learning_rate: sum(score.metrics[score.primary] or 0.0 for score in one.scores.values())
            for one in own
        }
        best = max(sorted(means), key=lambda rate: means[rate])
        assert found[f"{name}/0"].cell.protocol.learning_rate == best
    assert found["lora/0"].timing.train_step is not None

    before = files(Path("results"))
    assert bench(*flags, "--tune", "1e-2,1e-3") == 0  # the same grid
    assert files(Path("results")) == before
    # Whatever is run again, a trial is not: the rates were chosen by it.
    assert bench(*flags, "--rerun", "all") == 0
    after = files(Path("results"))
    kept = {name for name in before if name.startswith("tuning/")}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


@pytest.mark.slow
def test_a_matched_run_has_sizes_that_agree_and_rows_for_what_cannot(bench, capsys):
    assert bench("--methods", "lora,moelora,full", "--track", "matched", "--target-parameters", "16000") == 1
    found = {name.removesuffix("/0"): one for name, one in records().items()}
    assert {name: one.status for name, one in found.items()} == {
        "majority": "ok", "head": "ok", "lora": "ok", "moelora": "ok", "full": "unsupported",
    }  # fmt: skip
    for name in ("lora", "moelora"):
        assert abs(found[name].parameters.adapter - 16_000) <= 800
        assert found[name].cell.protocol.track == "matched"
        assert found[name].cell.protocol.target_parameters == 16_000
    assert found["full"].reason == "Unsupported: all weights train: there is no size to choose"
    assert "unsupported" in capsys.readouterr().out


# ---------------------------------------------------------------------- shards


@pytest.mark.slow
def test_shards_have_all_cells_between_them_and_the_last_writes_the_tables(bench, capsys):
    flags = ("--methods", "lora,ept")
    assert bench(*flags, "--shard", "1/2") == 0
    assert set(records()) == {"head/0", "ept/0"}
    assert not Path("results/tables").exists()
    assert "2 of 2 cells were run" in capsys.readouterr().out
    # Shards deal all cells, so that what one has done changes nothing for the others.
    assert bench(*flags, "--shard", "0/2", "--plan") == 0
    plan = capsys.readouterr().out.splitlines()
    assert sum("shard 0, will run" in line for line in plan) == 2
    assert sum("ok, shard 1" in line for line in plan) == 2
    # Another shard that ends at this moment is about to rename this one: it is not to be tidied away.
    half_written = Path("results/tables/scores.md.1-x.tmp")
    half_written.parent.mkdir()
    half_written.write_text("<!-- Written by `python -m benchmarks.report")
    assert bench(*flags, "--shard", "0/2") == 0
    assert set(records()) == {"majority/0", "head/0", "lora/0", "ept/0"}
    assert Path("results/tables/scores.md").is_file()
    assert half_written.is_file()


@pytest.mark.slow
def test_a_shard_of_a_tuned_run_has_whole_methods(bench):
    flags = ("--methods", "lora,ept", "--tune", "1e-3,1e-2", "--tune-steps", "1", "--steps", "1")
    assert bench(*flags, "--shard", "0/2") == 0
    assert {one.cell.method for one in Store(Path("results/tuning")).all()} == {"lora"}
    assert set(records()) == {"majority/0", "lora/0"}
    assert bench(*flags, "--shard", "1/2") == 0
    assert {one.cell.method for one in Store(Path("results/tuning")).all()} == {"head", "lora", "ept"}
    assert set(records()) == {"majority/0", "head/0", "lora/0", "ept/0"}
    assert Path("results/tables/tuning.md").is_file()


# ---------------------------------------------------------------------- several at once


@pytest.mark.slow
def test_cells_side_by_side_give_what_they_give_one_by_one(bench, capsys, monkeypatch):
    monkeypatch.setitem(registry.METHODS, "failing", "tests.benchmarks.end_to_end.failing_method:Failing")
    flags = ("--methods", "failing,lora,ept", "--tune", "1e-3,1e-2", "--tune-steps", "2")
    started: list[dict[str, Any]] = []
    real = pool.ProcessPool

    def noted(*arguments: Any, **options: Any) -> Any:
        started.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(pool, "ProcessPool", noted)
    assert bench(*flags) == 1
    assert not started
    capsys.readouterr()
    shared = set(Path(tempfile.gettempdir()).glob("moepeft-*.pickle"))
    assert bench(*flags, "--results", "side", "--jobs", "2") == 1
    printed = capsys.readouterr().out
    # One pool for trials and reported cells. What does not fit a pipe's buffer (64 KiB) makes a start wait until the
    # worker before has imported torch.
    assert [len(pickle.dumps(options["initargs"])) < 4096 for options in started] == [True]
    assert set(Path(tempfile.gettempdir()).glob("moepeft-*.pickle")) == shared
    for number in range(1, 9):
        assert f"[{number}/8]" in printed
    assert "### Scores" in printed
    alone, beside = records(), records(Path("side"))
    assert set(alone) == set(beside) == {f"{name}/0" for name in ("majority", "head", "failing", "lora", "ept")}
    for name, one in alone.items():
        other = beside[name]
        assert (other.cell, other.status, other.reason) == (one.cell, one.status, one.reason)
        assert (other.scores, other.budget, other.parameters) == (one.scores, one.budget, one.parameters)
        assert other.curve == one.curve
        assert other.timing.train_step is None
    assert alone["lora/0"].timing.train_step is not None
    assert len(Store(Path("side/tuning")).all()) == 8


@pytest.mark.slow
def test_a_process_that_dies_is_a_row_and_the_others_go_on(bench, monkeypatch, capsys):
    monkeypatch.setitem(registry.METHODS, "killer", "tests.benchmarks.end_to_end.test_jobs:Killer")
    assert bench("--methods", "killer,lora", "--seeds", "0,1", "--jobs", "2") == 1
    found = records()
    assert {name: one.status for name, one in found.items()} == {
        f"{name}/{seed}": "error" if name == "killer" else "ok"
        for name in ("majority", "head", "killer", "lora")
        for seed in (0, 1)
    }
    assert "killed by SIGKILL" in found["killer/0"].reason
    assert "| killer" in capsys.readouterr().out


def end_by_ctrl_c(command: int) -> None:
    os.killpg(command, signal.SIGINT)  # as a terminal does it: to every process


def end_by_scheduler(command: int) -> None:
    os.kill(command, signal.SIGTERM)


def end_for_want_of_memory(command: int) -> None:
    os.kill(command, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code"),
    [
        (end_by_ctrl_c, 130),
        pytest.param(end_by_scheduler, 130, marks=pytest.mark.exhaustive),
        (end_for_want_of_memory, -signal.SIGKILL),
    ],
)
def test_whatever_ends_the_command_ends_all_processes_and_records_nothing_false(bench, tmp_path, capfd, end, code):
    flags = ["--methods", "lora,ept", "--steps", "100000", "--jobs", "2"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.run",
        "--suite",
        "tiny.toml",
        "--results",
        "results",
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, *flags], cwd=tmp_path, env=environment, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not list(Path("results/records").glob("majority-*.json")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(1.0)  # both workers are at cells that would take very long
        end(process.pid)
        assert process.wait(timeout=60) == code
    assert set(records()) == {"majority/0"}
    assert not list(Path("results").rglob("*.tmp"))
    deadline = time.monotonic() + 30
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(process.pid) == []
    printed = capfd.readouterr()
    assert ("interrupted; the same command goes on" in printed.out) == (code == 130)
    assert "Traceback" not in printed.err


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_worker_that_cannot_begin_ends_the_command(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pool starts a worker that fails at its start again and again: the command would wait for ever.
    damaged = tmp_path / "damaged.pickle"
    damaged.write_bytes(b"no pickle")
    monkeypatch.setattr(pool, "_write_shared", lambda shared: damaged)
    with pytest.raises(pickle.UnpicklingError):
        bench("--methods", "lora", "--jobs", "2")
