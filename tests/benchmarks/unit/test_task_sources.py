"""Where the rows of a task come from: folders made here, good and broken, and tables shaped like the hub's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.tasks import DataUnavailable, Example, InvalidData, load_task
from benchmarks.tasks.commonsense import load_commonsense
from benchmarks.tasks.glue import load_glue
from benchmarks.tasks.loading import fingerprint

# Folder and file of the reported rows.
FILES = {
    "rte": ("glue/rte", "validation"),
    "stsb": ("glue/stsb", "validation"),
    "mnli": ("glue/mnli", "validation_matched"),
    "boolq": ("commonsense/boolq", "validation"),
    "arc_easy": ("commonsense/arc_easy", "test"),
    "openbookqa": ("commonsense/openbookqa", "test"),
}
RTE = {"sentence1": ["A dog runs. ", "B"], "sentence2": ["An animal runs.", "C"], "label": [0, 1]}
STSB = {"sentence1": ["A"], "sentence2": ["B"], "label": [2.5]}
BOOLQ = {"question": ["is it"], "passage": ["It is."], "answer": [True]}
ARC = {
    "question": ["What melts?"],
    "choices": [{"text": ["ice", "stone ", "air"], "label": ["1", "2", "3"]}],
    "answerKey": ["2"],
}
GOOD: dict[str, dict[str, list[Any]]] = {"rte": RTE, "stsb": STSB, "boolq": BOOLQ, "arc_easy": ARC}


def _write(root: Path, task: str, **changed: list[Any]) -> Path:
    """Writes both files of a task; `changed` replaces columns of the train file. Returns that file's path."""
    folder = root / FILES[task][0]
    folder.mkdir(parents=True)
    pq.write_table(pa.table(GOOD[task]), folder / f"{FILES[task][1]}.parquet")
    pq.write_table(pa.table({**GOOD[task], **changed}), folder / "train.parquet")
    return folder / "train.parquet"


def test_a_good_folder_loads_and_nothing_is_written(tmp_path: Path) -> None:
    for task in GOOD:
        _write(tmp_path, task)
    before = sorted(tmp_path.rglob("*"))
    assert list(load_task("rte", data_dir=tmp_path).train) == [
        Example(first="A dog runs.", second="An animal runs.", label=0),
        Example(first="B", second="C", label=1),
    ]
    assert list(load_task("stsb", data_dir=tmp_path).train) == [Example(first="A", second="B", label=2.5)]
    assert list(load_task("boolq", data_dir=tmp_path).train) == [Example(first="is it", second="It is.", label=1)]
    assert list(load_task("arc_easy", data_dir=tmp_path).validation) == [
        Example(first="What melts?", choices=("ice", "stone", "air"), label=1)
    ]
    assert sorted(tmp_path.rglob("*")) == before


def _choices(texts: list[str | None], labels: list[str]) -> list[dict[str, list[Any]]]:
    return [{"text": texts, "label": labels}]


@pytest.mark.parametrize(
    ("task", "column", "values", "message"),
    [
        ("rte", "label", [0, -1], r"row 1 .*column 'label' holds -1, wanted an integer from 0 to 1"),
        ("rte", "label", [2, 0], r"row 0 .*column 'label' holds 2"),
        ("rte", "label", [None, 0], r"column 'label' holds None"),
        ("rte", "label", [0.0, 1.0], r"column 'label' holds 0\.0, wanted an integer"),
        ("rte", "label", [True, False], r"column 'label' holds True, wanted an integer"),
        ("rte", "sentence2", ["x", None], r"row 1 .*column 'sentence2' holds None, wanted a text"),
        ("stsb", "label", [5.5], r"column 'label' holds 5\.5, wanted a number from 0 to 5"),
        ("stsb", "label", [float("nan")], r"column 'label' holds nan"),
        ("stsb", "label", ["3"], r"column 'label' holds '3'"),
        ("boolq", "answer", [1], r"column 'answer' holds 1, wanted true or false"),
        ("arc_easy", "answerKey", ["B"], r"column 'answerKey' holds 'B', wanted one of 1, 2, 3"),
        ("arc_easy", "choices", _choices(["a", "b"], ["2", "2"]), r"column 'choices' .*different labels"),
        ("arc_easy", "choices", _choices(["a"], ["2"]), r"column 'choices' .*two or more"),
        ("arc_easy", "choices", _choices(["a", "b"], ["1", "2", "3"]), r"column 'choices' .*as many"),
        ("arc_easy", "choices", _choices(["a", None], ["1", "2"]), r"column 'choices' "),
        ("arc_easy", "choices", [None], r"column 'choices' holds None"),
        ("arc_easy", "choices", ["ice or stone"], r"column 'choices' holds 'ice or stone'"),
    ],
)
def test_a_value_out_of_range_names_file_row_and_column(
    tmp_path: Path, task: str, column: str, values: list[Any], message: str
) -> None:
    path = _write(tmp_path, task, **{column: values})
    with pytest.raises(InvalidData, match=message) as caught:
        load_task(task, data_dir=tmp_path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path, "rte")
    pq.write_table(pa.table(RTE).drop_columns(["sentence2"]), path)
    with pytest.raises(InvalidData, match=r"lacks the column sentence2; it has sentence1, label") as caught:
        load_task("rte", data_dir=tmp_path)
    assert str(path) in str(caught.value)


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "rte")
    pq.write_table(pa.table(RTE).slice(0, 0), path)
    with pytest.raises(InvalidData, match=r"rte/train\.parquet has no rows"):
        load_task("rte", data_dir=tmp_path)


@pytest.mark.parametrize("keep", [0, 100])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = _write(tmp_path, "rte")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InvalidData, match=r"rte/train\.parquet cannot be read as Parquet"):
        load_task("rte", data_dir=tmp_path)


@pytest.mark.parametrize("task", ["rte", "mnli", "openbookqa"])
def test_a_missing_file_names_both_ways_out(tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a local folder was given, yet the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    folder, reported = FILES[task]
    with pytest.raises(DataUnavailable) as caught:
        load_task(task, data_dir=tmp_path / "nowhere")
    message = str(caught.value)
    assert str(tmp_path / "nowhere" / folder / "train.parquet") in message
    assert f"--data-dir FOLDER with {folder}/train.parquet and {folder}/{reported}.parquet in it" in message
    assert "HF_HUB_OFFLINE unset" in message


def test_the_fingerprint_covers_rows_order_and_split() -> None:
    rows = (Example("a", "b", label=0), Example("c", choices=("d", "é"), label=1))
    lines = b'["train","a","b",[],0]\n["validation","c",null,["d","\\u00e9"],1]\n'
    assert fingerprint(rows[:1], rows[1:]) == hashlib.sha256(lines).hexdigest()
    others = [fingerprint(rows, ()), fingerprint((), rows), fingerprint(rows[::-1], ())]
    others.append(fingerprint((Example("a", "b", label=1),), rows[1:]))
    assert len({fingerprint(rows[:1], rows[1:]), *others}) == 5


def _hub(monkeypatch: pytest.MonkeyPatch, table: Callable[[str], datasets.Dataset]) -> list[tuple[Any, ...]]:
    """Replaces the download by in-memory tables; returns the list of what is asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((path, name, split, revision))
        return table(split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_glue_table_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
            "idx": datasets.Value("int32"),
        }
    )

    def table(split: str) -> datasets.Dataset:
        columns = {"premise": ["It rains."], "hypothesis": [f"{split} "], "label": [2], "idx": [0]}
        return datasets.Dataset.from_dict(columns, features=features)

    asked = _hub(monkeypatch, table)
    data = load_glue("mnli")
    assert asked == [
        ("nyu-mll/glue", "mnli", "train", None),
        ("nyu-mll/glue", "mnli", "validation_matched", None),
    ]
    assert list(data.train) == [Example("It rains.", "train", label=2)]
    assert list(data.validation) == [Example("It rains.", "validation_matched", label=2)]
    assert data.source == (
        "nyu-mll/glue mnli, 1 train (subset of 392,702) and 1 validation_matched (subset of 9,815) rows"
    )


def test_an_arc_table_of_the_hub_equals_the_same_rows_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "choices": datasets.Sequence({"text": datasets.Value("string"), "label": datasets.Value("string")}),
            "answerKey": datasets.Value("string"),
        }
    )
    asked = _hub(monkeypatch, lambda _: datasets.Dataset.from_dict(ARC, features=features))
    data = load_commonsense("arc_easy")
    assert [(name, split) for _, name, split, _ in asked] == [("ARC-Easy", "train"), ("ARC-Easy", "test")]
    assert list(data.train) == [Example("What melts?", choices=("ice", "stone", "air"), label=1)]
    _write(tmp_path, "arc_easy")
    assert load_commonsense("arc_easy", data_dir=tmp_path).fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("task", "columns", "example"),
    [
        ("boolq", BOOLQ, Example("is it", "It is.", label=1)),
        (
            "piqa",
            {"goal": ["Cool it"], "sol1": ["fan"], "sol2": ["fire"], "label": [0]},
            Example("Cool it", choices=("fan", "fire"), label=0),
        ),
        (
            "social_iqa",
            {
                "context": ["Kai fell."],
                "question": ["How is Kai?"],
                "answerA": ["glad"],
                "answerB": ["hurt"],
                "answerC": ["rich"],
                "label": ["2"],
            },
            Example("Kai fell. How is Kai?", choices=("glad", "hurt", "rich"), label=1),
        ),
        (
            "winogrande",
            {"sentence": ["Ann beat Eve, so _ won."], "option1": ["Ann"], "option2": ["Eve"], "answer": ["1"]},
            Example("Ann beat Eve, so _ won.", choices=("Ann", "Eve"), label=0),
        ),
    ],
)
def test_the_other_tables_of_the_hub(
    task: str, columns: dict[str, list[Any]], example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _hub(monkeypatch, lambda _: datasets.Dataset.from_dict({**columns, "id": ["x"]}))
    assert list(load_commonsense(task).train) == [example]
    assert [split for _, _, split, _ in asked] == ["train", "validation"]


def test_more_rows_than_the_official_split_are_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    many = {column: values[:1] * 278 for column, values in RTE.items()}
    _hub(monkeypatch, lambda split: datasets.Dataset.from_dict(RTE if split == "train" else many))
    assert load_glue("rte").source.endswith("2 train (subset of 2,490) and 278 validation (officially 277) rows")


def test_the_unlabelled_test_split_of_the_hub_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _hub(monkeypatch, lambda _: datasets.Dataset.from_dict({**RTE, "label": [-1, -1]}))
    with pytest.raises(InvalidData, match=r"nyu-mll/glue rte, split train, row 0 .*column 'label' holds -1"):
        load_glue("rte")


def test_a_hub_table_without_a_column_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _hub(monkeypatch, lambda _: datasets.Dataset.from_dict(RTE).remove_columns("sentence1"))
    with pytest.raises(InvalidData, match=r"split train lacks the column sentence1; it has sentence2, label"):
        load_glue("rte")


@pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError, RuntimeError, ValueError])
def test_a_hub_out_of_reach_names_both_ways_out(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("Couldn't reach it.")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataUnavailable) as caught:
        load_task("boolq")
    message = str(caught.value)
    assert isinstance(caught.value.__cause__, error)
    assert f"the hub did not give google/boolq, split train ({error.__name__}: Couldn't reach it.)." in message
    assert "--data-dir FOLDER with commonsense/boolq/train.parquet and commonsense/boolq/validation" in message
    assert "HF_HUB_OFFLINE unset" in message
