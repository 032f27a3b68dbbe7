"""The loaders of the real tasks on the real files, and the names of all tasks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from benchmarks.tasks import SUITES, TASKS, DataUnavailable, Example, TaskData, UnknownTask, load_task
from benchmarks.tasks.commonsense import COMMONSENSE_TASKS, load_commonsense
from benchmarks.tasks.glue import GLUE_TASKS, load_glue
from benchmarks.tasks.metrics import METRICS

DATA = Path(__file__).resolve().parents[3] / "../shared/data"
DEFAULT_TASKS = (*SUITES["glue"], *SUITES["commonsense"])
LABELS = {"0": 0, "1": 1, "2": 2, "False": 0, "True": 1}
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real rows (shared/data) is not here")


def _folder(task: str) -> str:
    return f"{'glue' if task in GLUE_TASKS else 'commonsense'}/{task}"


def _reported_file(task: str) -> str:
    name = {"mnli": "validation_matched", "boolq": "validation"}.get(task)
    return name or ("validation" if task in GLUE_TASKS else "test")


@pytest.fixture(scope="module")
def tasks() -> dict[str, TaskData]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", _refuse)
        return {name: load_task(name, data_dir=DATA) for name in DEFAULT_TASKS}


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a local folder was given, yet the hub was asked")


@needs_data
@pytest.mark.parametrize("name", DEFAULT_TASKS)
def test_rows_and_labels_are_those_the_data_folder_documents(name: str, tasks: dict[str, TaskData]) -> None:
    documented = (DATA / "README.md").read_text(encoding="utf-8")
    for file, rows in (("train", tasks[name].train), (_reported_file(name), tasks[name].validation)):
        line = re.search(rf"^\| `{_folder(name)}/{file}\.parquet` \| ([\d,]+) \| ([^|]*) \|", documented, re.MULTILINE)
        assert line is not None
        assert len(rows) == int(line[1].replace(",", ""))
        if TASKS[name].kind == "classification":
            counts = (pair.split(": ") for pair in line[2].split(", "))
            expected = {LABELS[label]: int(count) for label, count in counts}
            assert Counter(row.label for row in rows) == expected


@needs_data
@pytest.mark.parametrize("name", DEFAULT_TASKS)
def test_every_row_fits_its_task(name: str, tasks: dict[str, TaskData]) -> None:
    spec = tasks[name].spec
    assert spec is TASKS[name]
    for row in (*tasks[name].train, *tasks[name].validation):
        texts = (row.first, *row.choices, *([] if row.second is None else [row.second]))
        assert all(text and text == text.strip() for text in texts)
        if spec.kind == "classification":
            assert type(row.label) is int
            assert 0 <= row.label < len(spec.labels)
            assert not row.choices
        elif spec.kind == "regression":
            assert type(row.label) is float
            assert spec.label_range is not None
            assert spec.label_range[0] <= row.label <= spec.label_range[1]
        else:
            assert 0 <= row.label < len(row.choices)
            assert row.second is None
    seconds = {row.second is None for row in tasks[name].train}
    assert seconds == {name in ("cola", "sst2") or spec.kind == "multiple_choice"}


def _plain(text: str | None) -> str:
    return " ".join((text or "").casefold().split())


def _same(row: Example) -> tuple[object, ...]:
    return _plain(row.first), _plain(row.second), tuple(sorted(map(_plain, row.choices)))


@needs_data
@pytest.mark.parametrize("name", DEFAULT_TASKS)
def test_no_train_row_is_reported(name: str, tasks: dict[str, TaskData]) -> None:
    assert not set(map(_same, tasks[name].train)) & set(map(_same, tasks[name].validation))


@needs_data
@pytest.mark.parametrize("name", ["openbookqa", "arc_easy", "arc_challenge"])
def test_the_answer_is_the_text_that_the_key_names(name: str, tasks: dict[str, TaskData]) -> None:
    raw = pq.read_table(DATA / _folder(name) / "test.parquet").to_pylist()
    kinds = set()
    for row, example in zip(raw, tasks[name].validation, strict=True):
        right = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))[row["answerKey"]]
        assert example.choices[example.label] == right.strip()
        kinds.add((row["answerKey"].isdigit(), len(example.choices)))
    if name.startswith("arc"):
        assert {digit for digit, _ in kinds} == {True, False}
        assert {count for _, count in kinds} >= {4, 5}


@needs_data
def test_the_direction_of_the_labels(tasks: dict[str, TaskData]) -> None:
    def label(task: str, beginning: str) -> str:
        rows = [row for row in tasks[task].train if row.first.startswith(beginning)]
        assert len(rows) == 1
        return TASKS[task].labels[int(rows[0].label)]

    assert label("sst2", "hide new secretions from the parental units") == "negative"
    assert label("rte", "No Weapons of Mass Destruction Found in Iraq Yet.") == "not_entailment"
    assert label("mnli", "Our hearts are particularly heavy this year") == "entailment"
    assert label("boolq", "was the color orange named after the fruit") == "yes"


@needs_data
def test_the_source_names_subsets(tasks: dict[str, TaskData]) -> None:
    assert tasks["rte"].source == "nyu-mll/glue rte from local files, 2,490 train and 277 validation rows"
    assert tasks["qqp"].source == (
        "nyu-mll/glue qqp from local files, 9,997 train (subset of 363,846) and 7,600 validation "
        "(subset of 40,430) rows"
    )
    subsets = {name for name, data in tasks.items() if "subset" in data.source}
    assert subsets == {
        *("cola", "sst2", "stsb", "qqp", "mnli", "qnli", "boolq", "openbookqa", "arc_easy"),
    }


@needs_data
def test_loading_again_gives_the_same_fingerprint(tasks: dict[str, TaskData]) -> None:
    assert load_glue("rte", data_dir=DATA).fingerprint == tasks["rte"].fingerprint
    assert len({data.fingerprint for data in tasks.values()}) == len(tasks)


@needs_data
@pytest.mark.parametrize("name", ["piqa", "social_iqa", "winogrande"])
def test_tasks_without_train_rows_in_the_folder_say_which_file_is_missing(name: str) -> None:
    with pytest.raises(DataUnavailable, match=rf"commonsense/{name}/train\.parquet, which does not exist"):
        load_commonsense(name, data_dir=DATA)


def test_suites_and_names() -> None:
    assert tuple(GLUE_TASKS) == ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
    assert SUITES["glue"] == tuple(GLUE_TASKS)
    assert SUITES["commonsense"] == ("boolq", "openbookqa", "arc_easy", "arc_challenge")
    assert set(SUITES["commonsense"]) < set(COMMONSENSE_TASKS)
    # One name, one task.
    assert len(TASKS) == len(SUITES["quick"]) + len(GLUE_TASKS) + len(COMMONSENSE_TASKS)
    assert all(spec.name == name and spec.metric in METRICS for name, spec in TASKS.items())


def test_generated_tasks_need_no_folder() -> None:
    name = SUITES["quick"][0]
    data = load_task(name)
    assert data.spec is TASKS[name]
    assert data.train
    assert data.validation


@pytest.mark.parametrize("load", [load_task, load_glue, load_commonsense])
def test_an_unknown_name_lists_what_there_is(load: Callable[[str], TaskData]) -> None:
    with pytest.raises(UnknownTask, match=r"is called 'nothing-of-the-kind'\..* Available: "):
        load("nothing-of-the-kind")


def test_an_unknown_name_suggests_close_ones() -> None:
    with pytest.raises(UnknownTask, match=r"Did you mean arc_easy"):
        load_task("arc-easy")
