"""The command from flags to tables on a random two-layer BERT: resume, determinism, failures as rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import benchmarks.cells.cell
from benchmarks.records.schema import RunRecord
from benchmarks.records.store import Store
from benchmarks.run import main
from moepeft import registry

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[3]

# One task of each kind, and everything as small as it can be.
PROTOCOL = """
tasks = ["q_sst2", "q_stsb", "q_arc_easy"]
backbone = "tiny-bert"
steps = 6
batch_size = 8
train_rows = 60
eval_rows = 20
max_length = 64
precision = "fp32"
log_every = 3
[timing]
warmup = 1
repeats = 2
rows = 6
length = 8
"""


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS, "failing", "tests.benchmarks.end_to_end.failing_method:Failing")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command on the small protocol, into tmp_path/results."""
    (tmp_path / "tiny.toml").write_text(PROTOCOL)
    monkeypatch.chdir(tmp_path)

    def run(methods: str, *flags: str) -> int:
        return main(["--suite", "tiny.toml", "--results", "results", "--device", "cpu", "--methods", methods, *flags])

    return run


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Methods of the cells that were really run, in order."""
    names: list[str] = []
    real = benchmarks.cells.cell.run_cell

    def spy(planned: Any, *rest: Any) -> Any:
        names.append(f"{planned.cell.method}/{planned.cell.seed}")
        return real(planned, *rest)

    monkeypatch.setattr(benchmarks.cells.cell, "run_cell", spy)
    return names


def records(root: Path = Path("results")) -> dict[str, RunRecord]:
    return {f"{one.cell.method}/{one.cell.seed}": one for one in Store(root).all()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_ends_in_records_and_tables_and_its_repetition_does_nothing(bench, ran, capsys):
    assert bench("lora", "--seeds", "0,1") == 0
    assert ran == ["majority/0", "head/0", "lora/0", "majority/1", "head/1", "lora/1"]
    printed = capsys.readouterr().out
    for word in ("majority", "head", "lora", "q_sst2", "q_stsb", "q_arc_easy"):
        assert word in printed
    found = records()
    assert set(found) == set(ran)
    assert {one.status for one in found.values()} == {"ok"}
    before = files(Path("results"))
    assert {"tables/parameters.md", "tables/scores.csv", "tables/throughput.md"} <= set(before)

    assert bench("lora", "--seeds", "0,1") == 0
    assert len(ran) == 6
    assert files(Path("results")) == before


@pytest.mark.slow
def test_what_a_record_says_is_consistent(bench):
    assert bench("lora,full") == 0
    found = records()
    lora, head, majority, full = (found[f"{name}/0"] for name in ("lora", "head", "majority", "full"))
    assert lora.parameters.adapter == lora.parameters.adapter_closed_form > 0
    assert head.parameters.adapter == majority.parameters.heads == 0
    assert lora.parameters.heads == head.parameters.heads == 32 * 4 + 4  # two classes, one score, one choice score
    assert lora.parameters.base == head.parameters.base == full.parameters.adapter
    for one in (lora, head, full):
        assert one.budget.steps == 6
        assert one.budget.rows == sum(one.budget.rows_per_task.values()) == 48
        assert one.budget.tokens <= one.budget.padded_tokens
        assert [point.step for point in one.curve] == [1, 3, 6]
        assert one.timing.train_step.repeats == 2
        tokens = 6 * 8
        assert one.timing.inference_tokens_per_second == pytest.approx(tokens / one.timing.inference_step.median)
        assert one.backbone.startswith("tiny-bert")
    assert majority.budget is None
    for one in (lora, head, majority, full):
        outcomes = Store(Path("results")).outcomes(one)
        assert outcomes.groupby("task").size().to_dict() == dict.fromkeys(one.scores, 20)
        sst2 = outcomes[outcomes.task == "q_sst2"]
        assert sst2.correct.mean() == pytest.approx(one.scores["q_sst2"].metrics["accuracy"])
        stsb = outcomes[outcomes.task == "q_stsb"]
        assert stsb.correct.isna().all()
        assert stsb.prediction.between(0, 5).all()


@pytest.mark.slow
def test_the_same_command_gives_the_same_numbers(bench):
    assert bench("lora") == 0
    assert bench("lora", "--results", "again") == 0
    first, second = records(), records(Path("again"))
    for name in ("head/0", "lora/0"):
        assert first[name].scores == second[name].scores
        assert first[name].curve == second[name].curve
        assert first[name].budget == second[name].budget
        both = [Store(Path(root)).outcomes(one) for root, one in (("results", first[name]), ("again", second[name]))]
        pd.testing.assert_frame_equal(*both)


@pytest.mark.slow
def test_methods_see_the_same_rows_and_start_from_the_same_heads(bench):
    assert bench("lora,moelora,mixlora,tucka,ept,mola", "--steps", "2") == 0
    found = {name: one for name, one in records().items() if name != "majority/0"}
    assert len(found) >= 4
    assert len({one.budget.model_dump_json() for one in found.values()}) == 1
    # An adapter that starts as the identity has the loss of the bare heads in the first step, to the last digits.
    first_losses = {name: one.curve[0].losses["task"] for name, one in found.items()}
    assert first_losses["lora/0"] == pytest.approx(first_losses["head/0"], rel=1e-6)


@pytest.mark.slow
def test_a_deleted_record_is_the_only_cell_that_is_run_again(bench, ran):
    assert bench("lora") == 0
    before = {name: content for name, content in files(Path("results/records")).items() if not name.startswith("head")}
    (deleted,) = Path("results/records").glob("head-*.json")
    deleted.unlink()
    ran.clear()
    assert bench("lora") == 0
    assert ran == ["head/0"]
    after = files(Path("results/records"))
    assert deleted.name in after
    assert {name: after[name] for name in before} == before


@pytest.mark.slow
def test_other_settings_are_other_cells_and_rerun_all_runs_again(bench, ran):
    assert bench("head") == 0
    ran.clear()
    assert bench("head", "--learning-rate", "0.01") == 0
    assert len(ran) == 2
    ran.clear()
    assert bench("head", "--rerun", "all") == 0
    assert len(ran) == 2
    assert len(Store(Path("results")).all()) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("failing")
def test_failures_become_rows_and_the_other_methods_go_on(bench, ran, capsys):
    methods = "failing,failing@diverged,failing@oom,failing@unsupported,lora"
    assert bench(methods) == 1
    found = records()
    statuses = {name.removesuffix("/0"): one.status for name, one in found.items()}
    assert statuses == {
        "majority": "ok",
        "head": "ok",
        "failing": "error",
        "failing@diverged": "diverged",
        "failing@oom": "oom",
        "failing@unsupported": "unsupported",
        "lora": "ok",
    }
    error = found["failing/0"]
    assert error.reason == "RuntimeError: an expert is missing in somewhere"
    assert "in forward" in error.traceback
    assert str(ROOT) not in error.traceback
    assert "since step 1" in found["failing@diverged/0"].reason
    printed = capsys.readouterr().out
    assert "needs gated feed-forward networks" in printed
    scores = Path("results/tables/scores.md").read_text()
    for status in ("error", "diverged", "oom", "unsupported"):
        assert status in scores

    # Rows stay rows: nothing is tried again unasked, and then only what failed.
    ran.clear()
    assert bench(methods) == 1
    assert ran == []
    assert bench(methods, "--rerun", "failed") == 1
    assert ran == ["failing/0", "failing@diverged/0", "failing@oom/0", "failing@unsupported/0"]


@pytest.mark.usefixtures("failing")
def test_ctrl_c_keeps_what_is_done_stops_and_is_taken_up_again(bench, ran):
    methods = "failing@interrupted,lora"
    assert bench(methods) == 130
    assert ran == ["majority/0", "head/0", "failing@interrupted/0"]
    assert records()["failing@interrupted/0"].status == "interrupted"
    ran.clear()
    assert bench(methods) == 130
    assert ran == ["failing@interrupted/0"]


def test_plan_says_what_would_run_and_runs_nothing(bench, ran, capsys):
    assert bench("head") == 0
    ran.clear()
    capsys.readouterr()
    assert bench("lora", "--plan") == 0
    assert ran == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines[:-1]] == [
        "majority  seed 0  ok",
        "head  seed 0  ok",
        "lora  seed 0  missing, will run",
    ]
    assert lines[-1].startswith("1 of 3 cells to run")


@pytest.mark.slow
def test_a_budget_that_differs_is_an_error(bench, capsys):
    assert bench("lora") == 0
    (path,) = Path("results/records").glob("lora-*.json")
    text = json.loads(path.read_text())
    text["budget"]["tokens"] += 1
    path.write_text(json.dumps(text))
    capsys.readouterr()
    assert bench("lora") == 1
    assert "did not consume the same: tokens" in capsys.readouterr().out


def test_a_damaged_record_is_named_not_overwritten(bench, capsys):
    assert bench("head") == 0
    (path,) = Path("results/records").glob("head-*.json")
    path.write_text("{")
    capsys.readouterr()
    assert bench("head") == 2
    assert path.name in capsys.readouterr().err
    assert path.read_text() == "{"


@pytest.mark.slow
def test_a_killed_run_resumes_where_it_stood(bench, ran, tmp_path):
    flags = ["--suite", "tiny.toml", "--results", "results", "--device", "cpu", "--methods", "lora", "--steps", "60"]
    command = [sys.executable, "-m", "benchmarks.run", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(Path("results/records").glob("head-*.json")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = files(Path("results/records"))
    assert sorted(name.split("-")[0] for name in before) == ["head", "majority"]

    assert main(flags) == 0
    assert ran == ["lora/0"]
    after = files(Path("results/records"))
    assert {name: after[name] for name in before} == before
    assert len(after) == 3
