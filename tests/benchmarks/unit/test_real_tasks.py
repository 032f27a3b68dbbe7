"""The public tasks on rows made here, in the columns and files of the public sets; and the names of all tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.tasks import TASKS, DataUnavailable, Example, UnknownTask, load_task
from benchmarks.tasks.commonsense import COMMONSENSE_TASKS, load_commonsense
from benchmarks.tasks.glue import GLUE_TASKS, load_glue
from benchmarks.tasks.metrics import METRICS
from benchmarks.tasks.quick import QUICK_TASKS

PAIR = {"sentence1": "A dog runs. ", "sentence2": "An animal runs."}
READ_PAIR = ("A dog runs.", "An animal runs.")
FOUR = {"text": ["ice", "snow", " fire", "rain"], "label": ["A", "B", "C", "D"]}
FIVE = {"text": ["ice", "snow", "fire", "rain", "sand"], "label": ["1", "2", "3", "4", "5"]}
READ_FOUR = ("ice", "snow", "fire", "rain")

# Task, its folder, the file of its reported rows, a row as the set has it, the row as read, what its label means.
Case = tuple[str, str, str, dict[str, Any], Example, object]
CASES: list[Case] = [
    ("cola", "glue", "validation", {"sentence": "Bird fly the.", "label": 0}, Example("Bird fly the."), "unacceptable"),
    ("sst2", "glue", "validation", {"sentence": "a joy ", "label": 1}, Example("a joy", label=1), "positive"),
    ("mrpc", "glue", "validation", {**PAIR, "label": 1}, Example(*READ_PAIR, label=1), "equivalent"),
    ("stsb", "glue", "validation", {**PAIR, "label": 3.8}, Example(*READ_PAIR, label=3.8), 3.8),
    ("rte", "glue", "validation", {**PAIR, "label": 0}, Example(*READ_PAIR, label=0), "entailment"),
    (
        "qqp", "glue", "validation", {"question1": "Why?", "question2": "How?", "label": 0},
        Example("Why?", "How?", label=0), "not_duplicate",
    ),
    (
        "mnli", "glue", "validation_matched", {"premise": "It rains.", "hypothesis": "It is dry.", "label": 2},
        Example("It rains.", "It is dry.", label=2), "contradiction",
    ),
    (
        "qnli", "glue", "validation", {"question": "Who?", "sentence": "It rains.", "label": 1},
        Example("Who?", "It rains.", label=1), "not_entailment",
    ),
    (
        "boolq", "commonsense", "validation", {"question": "is it hot", "passage": "Fire is hot.", "answer": True},
        Example("is it hot", "Fire is hot.", label=1), "yes",
    ),
    (
        "openbookqa", "commonsense", "test", {"question_stem": "Hot is", "choices": FOUR, "answerKey": "C"},
        Example("Hot is", choices=READ_FOUR, label=2), "fire",
    ),
    (
        "arc_easy", "commonsense", "test", {"question": "What is hot?", "choices": FOUR, "answerKey": "C"},
        Example("What is hot?", choices=READ_FOUR, label=2), "fire",
    ),
    (
        "arc_challenge", "commonsense", "test", {"question": "What is dry?", "choices": FIVE, "answerKey": "5"},
        Example("What is dry?", choices=(*READ_FOUR, "sand"), label=4), "sand",
    ),
    (
        "piqa", "commonsense", "validation", {"goal": "melt ice", "sol1": "heat it", "sol2": "cool it", "label": 0},
        Example("melt ice", choices=("heat it", "cool it"), label=0), "heat it",
    ),
    (
        "social_iqa", "commonsense", "validation",
        {"context": "Ann ran.", "question": "Why?", "answerA": "fun", "answerB": "fear",
         "answerC": "cold", "label": "2"},
        Example("Ann ran. Why?", choices=("fun", "fear", "cold"), label=1), "fear",
    ),
    (
        "winogrande", "commonsense", "validation",
        {"sentence": "The cup broke the glass as the _ was hard.", "option1": "cup", "option2": "glass", "answer": "1"},
        Example("The cup broke the glass as the _ was hard.", choices=("cup", "glass"), label=0), "cup",
    ),
]  # fmt: skip


def write(root: Path, case: Case, *, train_rows: int = 1) -> None:
    task, suite, reported, row, *_ = case
    folder = root / suite / task
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row] * train_rows), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist([{**row, "a_further_column": 1}]), folder / f"{reported}.parquet")


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a local folder was given, yet the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def test_every_public_task_has_a_case() -> None:
    assert {task for task, *_ in CASES} == {*GLUE_TASKS, *COMMONSENSE_TASKS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_row_is_read_and_its_label_means_what_the_set_says(tmp_path: Path, case: Case) -> None:
    write(tmp_path, case)
    task, *_, example, meaning = case
    data = load_task(task, data_dir=tmp_path)
    assert (list(data.train), list(data.validation)) == ([example], [example])
    spec = data.spec
    assert spec is TASKS[task]
    if spec.kind == "classification":
        assert spec.labels[int(example.label)] == meaning
    elif spec.kind == "regression":
        assert example.label == meaning
        assert spec.score_range[0] <= example.label <= spec.score_range[1]
    else:
        assert example.choices[int(example.label)] == meaning


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_the_source_names_the_set_and_its_official_size(tmp_path: Path, case: Case) -> None:
    write(tmp_path, case, train_rows=3)
    source = load_task(case[0], data_dir=tmp_path).source
    assert "from local files" in source
    assert "3 train (subset of " in source
    assert f"1 {case[2]} (subset of " in source


def test_loading_again_gives_the_same_fingerprint_and_other_rows_another(tmp_path: Path) -> None:
    for case in CASES:
        write(tmp_path / "one", case)
        write(tmp_path / "two", case, train_rows=2)
        first, again = (load_task(case[0], data_dir=tmp_path / "one").fingerprint for _ in range(2))
        assert first == again != load_task(case[0], data_dir=tmp_path / "two").fingerprint


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_missing_file_is_named(tmp_path: Path, case: Case) -> None:
    write(tmp_path, case)
    path = tmp_path / case[1] / case[0] / "train.parquet"
    path.unlink()
    with pytest.raises(DataUnavailable) as caught:
        load_task(case[0], data_dir=tmp_path)
    assert str(path) in str(caught.value)


def test_names() -> None:
    # One name, one task.
    flipped = [name for name in TASKS if name.endswith("_flipped")]
    assert len(TASKS) == len(QUICK_TASKS) + len(GLUE_TASKS) + len(COMMONSENSE_TASKS) + len(flipped)
    assert all(spec.name == name and spec.metric in METRICS for name, spec in TASKS.items())


def test_generated_tasks_need_no_folder() -> None:
    name = QUICK_TASKS[0].name
    data = load_task(name)
    assert data.spec is TASKS[name]
    assert data.train
    assert data.validation


@pytest.mark.parametrize("load", [load_task, load_glue, load_commonsense])
def test_an_unknown_name_lists_what_there_is(load: Callable[[str], object]) -> None:
    with pytest.raises(UnknownTask, match=r"is called 'nothing-of-the-kind'\..* Available: "):
        load("nothing-of-the-kind")


def test_an_unknown_name_suggests_close_ones() -> None:
    with pytest.raises(UnknownTask, match=r"Did you mean arc_easy"):
        load_task("arc-easy")
