"""Experiments: rates are found as the rule says, archives survive a crash, tables say what the runs were."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import moepeft
from benchmarks.mechanisms.command import run_mechanisms
from benchmarks.mechanisms.experiments import Experiment, available_experiments, load_experiment, shortened
from benchmarks.mechanisms.frame import Incomplete, follows_size, read_choices, read_frame
from benchmarks.mechanisms.runs import Archive, Outcome, Run, execute, plan_run
from benchmarks.mechanisms.students import Lesson
from benchmarks.mechanisms.suite import Suite
from benchmarks.mechanisms.tables import interval, multiplier, pairs_table
from benchmarks.mechanisms.teachers import Curriculum
from benchmarks.mechanisms.tuning import choose_rate
from benchmarks.protocols.halving import Halving
from benchmarks.protocols.protocol import UsageError
from benchmarks.records.store import RecordError
from benchmarks.run import main
from moepeft.config import expert_sizes

TINY = Experiment(
    name="tiny",
    question="Does it run?",
    teacher={"width": 16, "inner": 24, "tasks": 3},
    vary={"conflict": (0.0, 1.0)},
    oracle="moelora",
    reference="lora",
    lesson=Lesson(steps=12, warmup=3, rows=8, exams=(6,), exam_rows=16),
    tuning=Halving(rates=(1e-3, 1e-2), seeds=(1000,), first_steps=4, extensions=1),
    seeds=(0, 1),
)


def pretend(archive: Archive, score: Callable[[float], float]) -> Callable[[Sequence[Run]], None]:
    """An executor that gives every run the score of its rate."""

    def make(runs: Sequence[Run]) -> None:
        for run in archive.missing(runs):
            curve = {run.lesson.steps: (score(run.rate),) * run.curriculum.tasks}
            archive.add(Outcome(run=run, status="ok", bound=1.0, curve=curve, seconds=0.0, machine="none"))

    return make


def with_rates(*rates: float, extensions: int = 3) -> Experiment:
    return TINY.model_copy(update={"tuning": TINY.tuning.model_copy(update={"rates": rates, "extensions": extensions})})


@pytest.mark.parametrize(
    ("peak", "best", "at_edge"),
    [(3e-3, 3e-3, False), (1e-1, 1e-1, False), (1e-4, 1e-4, False), (1e3, 1.0, True)],
    ids=["inside", "above", "below", "beyond all extensions"],
)
def test_the_grid_grows_until_the_best_rate_is_inside(tmp_path: Path, peak: float, best: float, at_edge: bool) -> None:
    archive = Archive(tmp_path)
    make = pretend(archive, lambda rate: -abs(math.log(rate / peak)) / 50)
    choice = choose_rate(with_rates(1e-3, 3e-3, 1e-2, 3e-2), "lora", archive, make)
    assert choice.rate == pytest.approx(best, rel=0.2)
    assert choice.at_edge is at_edge


def test_a_trial_that_fails_is_the_worst_and_how_badly_it_ended_does_not_matter(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    make = pretend(archive, lambda rate: -1e9 if rate > 2e-3 else -0.5)
    choice = choose_rate(with_rates(1e-3, 3e-3, 1e-2, 3e-2, extensions=1), "lora", archive, make)
    assert choice.rate < 2e-3
    assert min(score for _, score in choice.tried) == -1.0


def test_tuning_looks_at_no_reported_teacher(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    seen: list[Run] = []
    make = pretend(archive, lambda rate: 0.0)
    choose_rate(TINY, "lora", archive, lambda runs: (seen.extend(runs), make(runs))[1])
    assert seen
    assert not {run.seed for run in seen} & set(TINY.seeds)


@pytest.mark.slow
def test_a_suite_is_resumed_from_its_archive_and_its_tables_come_from_it_alone(tmp_path: Path) -> None:
    said: list[str] = []
    run_mechanisms([TINY], ["more"], tmp_path, jobs=1, command="test", say=said.append)
    before = (tmp_path / "runs.jsonl").read_bytes()
    tables = {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}
    assert {"tiny-scores.md", "tiny-pairs.csv", "tiny-swap-loss.md"} <= set(tables)
    run_mechanisms([TINY], ["more"], tmp_path, jobs=1, command="test", say=said.append)
    assert (tmp_path / "runs.jsonl").read_bytes() == before
    assert {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()} == tables


def test_a_deleted_run_is_missed_by_name(tmp_path: Path) -> None:
    run_mechanisms([TINY], [], tmp_path, jobs=1, command="test", say=lambda _: None)
    archive = Archive(tmp_path)
    choices = read_choices(TINY, [], archive)
    frame = read_frame(TINY, choices, archive)
    assert len(frame) == 2 * 2 * 2  # methods, teachers, seeds
    assert set(frame["machine"]) <= set(archive.machines())
    gone = frame["run"].iloc[-1]
    path = tmp_path / "runs.jsonl"
    kept = [line for line in path.read_text().splitlines() if Run_id(line) != gone]
    path.write_text("".join(f"{line}\n" for line in kept))
    with pytest.raises(Incomplete, match=gone):
        read_frame(TINY, choices, Archive(tmp_path))


def Run_id(line: str) -> str:  # noqa: N802
    return Outcome.model_validate_json(line).run.id


def test_half_a_line_at_the_end_is_forgotten(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    factory = moepeft.method("lora")
    runs = [plan_run(Curriculum(), Lesson(), "lora", factory, 1e-3, seed) for seed in (0, 1)]
    pretend(archive, lambda rate: 0.5)(runs)
    path = tmp_path / "runs.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-10])
    torn = path.read_text()
    again = Archive(tmp_path)
    assert path.read_text() == torn  # another process may be at work on it
    assert again.find(runs[0]) is not None
    assert again.missing(runs) == [runs[1]]
    pretend(again, lambda rate: 0.5)(runs)
    assert path.read_text() == whole


@pytest.mark.parametrize(("name", "named"), [("runs.jsonl", "line 1"), ("machines.jsonl", "machines")])
def test_a_damaged_archive_is_named_with_its_line(tmp_path: Path, name: str, named: str) -> None:
    archive = Archive(tmp_path)
    pretend(archive, lambda rate: 0.5)([plan_run(Curriculum(), Lesson(), "lora", moepeft.method("lora"), 1e-3, 0)])
    archive.note_machine("as typed")
    path = tmp_path / name
    path.write_text("{]" + path.read_text())
    with pytest.raises(RecordError, match=named):
        Archive(tmp_path).machines()


def test_a_run_that_cannot_be_made_is_an_outcome_that_says_why() -> None:
    narrow = Curriculum(width=4, inner=4, tasks=2)
    config = dataclasses.asdict(moepeft.method("moelora", num_tasks=1))
    run = Run(curriculum=narrow, lesson=TINY.lesson, method="moelora", config=config, rate=1e-3, seed=0, draws=2)
    outcome = execute(run, "none")
    assert outcome.status == "unsupported"
    assert outcome.reason


# ---------------------------------------------------------------------- tables


def test_intervals_are_scipys() -> None:
    values = [0.1, 0.4, 0.2, 0.35]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    mean, half = interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def frame_of(rows: Sequence[tuple[str, float, float, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["method", "size", "parameters", "score"]).assign(seed=0)


def test_a_multiplier_by_hand() -> None:
    reference = [("lora", 2, 100, 0.2), ("lora", 8, 400, 0.6)]
    other = [("other", 2, 50, 0.2), ("other", 8, 200, 0.6), ("other", 32, 800, 0.5)]
    frame = frame_of([*reference, *other])
    assert math.exp(multiplier(frame, "lora", "other", 8)) == pytest.approx(2.0)
    between = frame_of([("lora", 2, 100, 0.4), *other])
    assert math.exp(multiplier(between, "lora", "other", 2)) == pytest.approx(1.0)  # halfway: sqrt(50 * 200) = 100
    assert multiplier(frame_of([("lora", 2, 100, 0.9), *other]), "lora", "other", 2) == -math.inf
    assert multiplier(frame_of([("lora", 2, 100, 0.1), *other]), "lora", "other", 2) == math.inf


def test_pairs_are_paired_by_seed_and_adjusted_by_holm() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=8)
    scores = {"a": base, "b": base + 0.1 + 0.01 * rng.normal(size=8), "c": rng.normal(size=8)}
    frame = pd.DataFrame(
        [
            {"method": name, "seed": seed, "score": value, "conflict": 1.0}
            for name, values in scores.items()
            for seed, value in enumerate(values)
        ]
    )
    experiment = TINY.model_copy(update={"vary": {"conflict": (1.0,)}})
    table = pairs_table(experiment, frame).data.set_index(["better", "worse"])
    assert table.loc[("b", "a"), "p"] == pytest.approx(stats.ttest_rel(scores["b"], scores["a"]).pvalue)
    assert table.loc[("b", "a"), "p_holm"] == pytest.approx(3 * table.loc[("b", "a"), "p"])
    assert table["decided"].tolist() == [True, False, False]


def test_pairs_of_teachers_without_an_order_are_all_compared() -> None:
    """Among words the last one is no more of an answer than the first; numbers are compared at the last one."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        [
            {"method": name, "seed": seed, "score": place + rng.normal(), "structure": word, "tasks": tasks}
            for word, tasks in (("low_rank", 2), ("pyramid", 8))
            for name, place in (("a", 0.0), ("b", 9.0), ("c", 0.0))
            for seed in range(6)
        ]
    )
    words = pairs_table(TINY.model_copy(update={"vary": {"structure": ("low_rank", "pyramid")}}), frame)
    assert words.data.groupby("teacher").size().to_dict() == {"low_rank": 3, "pyramid": 3}
    assert sorted(words.text["teacher"].unique()) == ["low_rank", "pyramid"]
    assert words.data["p_holm"].min() == pytest.approx(6 * words.data["p"].min())
    assert words.data["decided"].sum() == 4
    assert "4 of 6 pairs are decided at low_rank, pyramid" in words.notes[0]
    numbers = pairs_table(TINY.model_copy(update={"vary": {"tasks": (2, 8)}}), frame)
    assert set(numbers.data["teacher"]) == {"8"}
    assert "teacher" not in numbers.text


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("name", available_experiments())
def test_every_experiment_of_the_project_can_be_planned(name: str) -> None:
    experiment = shortened(load_experiment(name), steps=None, seeds=(0,))
    for method in experiment.contestants(["moelora"]):
        if method not in moepeft.available():
            continue
        for curriculum in experiment.curricula():
            assert list(experiment.students(method, curriculum))


def test_wrong_experiments_are_refused_in_one_line(tmp_path: Path) -> None:
    for text, expected in [("conflict = ", "not a TOML file"), ('question = "?"\nreference = "lora"', "oracle")]:
        path = tmp_path / "wrong.toml"
        path.write_text(text)
        with pytest.raises(UsageError, match=expected) as refused:
            load_experiment(str(path))
        assert "\n" not in str(refused.value).strip()
    with pytest.raises(UsageError, match="unknown experiment"):
        load_experiment("nothing")


def test_suite_has_a_reference_and_an_oracle_whatever_was_asked_for(tmp_path: Path) -> None:
    assert TINY.contestants(["ept", "lora"]) == ("lora", "ept", "moelora")
    assert Suite(tmp_path, ["ept"], jobs=1, command="", say=print).archive.root == tmp_path


def test_later_tasks_are_taught_alone_and_what_the_first_ones_lose_is_measured(tmp_path: Path) -> None:
    lesson = dataclasses.replace(TINY.lesson, first_tasks=2, first_steps=6)
    assert [lesson.tasks_at(step, 3) for step in (1, 6, 7, 12)] == [(0, 2), (0, 2), (2, 3), (2, 3)]
    assert lesson.with_steps(4).first_steps == 2
    with pytest.raises(ValueError, match="first_steps"):
        dataclasses.replace(TINY.lesson, first_tasks=2)
    curriculum = TINY.curricula()[-1]
    factory = moepeft.method("moelora", num_tasks=3)
    outcome = execute(plan_run(curriculum, lesson, "moelora", factory, 1e-2, 0), "none")
    before, after = outcome.curve[6], outcome.curve[12]
    assert outcome.forgotten == pytest.approx((before[0] - after[0] + before[1] - after[1]) / 2)
    once = execute(plan_run(curriculum, TINY.lesson, "moelora", factory, 1e-2, 0), "none")
    assert once.forgotten is None


def test_the_load_of_experts_is_a_share() -> None:
    factory = moepeft.method("moelora", num_tasks=3)
    outcome = execute(plan_run(TINY.curricula()[0], TINY.lesson, "moelora", factory, 1e-2, 0), "none")
    used = np.array(outcome.usage[12])
    assert used.shape == (3, factory.num_experts)  # type: ignore[attr-defined]
    assert used.sum(axis=1) == pytest.approx(np.ones(3), abs=1e-4)
    assert outcome.largest_share == pytest.approx(used.sum(axis=0).max() / 3, abs=1e-4)


@pytest.mark.slow
def test_the_command_runs_an_experiment_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        'question = "?"\nreference = "lora"\noracle = "moelora"\nseeds = [0]\n'
        "[teacher]\nwidth = 16\ninner = 24\ntasks = 2\n[vary]\nconflict = [1.0]\n"
        "[lesson]\nsteps = 8\nwarmup = 2\nrows = 8\nexams = []\nexam_rows = 16\n"
        "[tuning]\nrates = [1e-3, 1e-2]\nseeds = [1000]\nfirst_steps = 2\nextensions = 1\n"
    )
    flags = ["--suite", "mechanisms", "--tasks", str(path), "--methods", "more", "--results", str(tmp_path / "out")]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    for method in ("lora", "more", "moelora"):
        assert f"| {method} " in printed
    assert (tmp_path / "out" / "tables" / "own-scores.csv").is_file()


def test_fields_of_the_command_line_configure_a_student() -> None:
    (curriculum,) = {one.tasks: one for one in TINY.curricula()}.values()
    ((size, factory),) = TINY.students("mixlora@released+balance_coefficient=0", curriculum)
    assert size is None
    assert factory == moepeft.method("mixlora@released", num_tasks=3, balance_coefficient=0)
    with pytest.raises(UsageError, match="majority"):
        list(TINY.students("majority", curriculum))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--backbone", "minilm"], "--backbone"),
        (["--jobs", "0"], "--jobs 0"),
        (["--tasks", "nothing"], "nothing"),
        (["--methods", "lorra"], "lorra"),
    ],
)
def test_what_the_suite_does_not_know_is_one_line(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--suite", "mechanisms", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line


@pytest.mark.parametrize(("method", "sizes"), [("ept", (2, 2, 4, 4, 6, 6, 8, 8)), ("more", tuple(range(1, 9)))])
def test_the_size_of_every_expert_stands_in_the_order_of_the_gates(method: str, sizes: tuple[int, ...]) -> None:
    factory = moepeft.method(method, num_tasks=3)
    curriculum = Curriculum(structure="pyramid", tasks=3, width=24, inner=48)
    outcome = execute(plan_run(curriculum, TINY.lesson, method, factory, 1e-2, 0), "none")
    assert expert_sizes(factory) == sizes
    assert len(outcome.usage[12][0]) == len(sizes)
    assert follows_size(outcome) is not None
