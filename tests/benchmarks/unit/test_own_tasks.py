"""Own data: tables of every format become tasks, and what is wrong is said in one line with file and row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.tasks import DataUnavailable, InvalidData, load_task
from benchmarks.tasks.base import Example

WRITERS: dict[str, Callable[[pd.DataFrame, Path], Any]] = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "parquet": lambda frame, path: frame.to_parquet(path),
}
REVIEWS = pd.DataFrame({"review": [f"text {number}" for number in range(20)], "stars": ["good", "bad"] * 10})


def write(folder: Path, frame: pd.DataFrame, suffix: str = "csv", test: pd.DataFrame | None = None, **keys: Any) -> str:
    WRITERS[suffix](frame, folder / f"rows.{suffix}")
    fields = {"name": "reviews", "kind": "classification", "text": "review", "label": "stars"} | keys
    fields.setdefault("train", f"rows.{suffix}")
    if test is not None:
        WRITERS[suffix](test, folder / f"test.{suffix}")
        fields["test"] = f"test.{suffix}"
    path = folder / "reviews.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items() if value is not None))
    return str(path)


@pytest.mark.parametrize("suffix", WRITERS)
def test_tables_of_every_format_give_the_same_task(tmp_path: Path, suffix: str) -> None:
    task = load_task(write(tmp_path, REVIEWS[:16], suffix, test=REVIEWS[16:]))
    assert task.spec.labels == ("bad", "good")
    assert task.spec.metric == "accuracy"
    assert task.train[0] == Example("text 0", label=1)
    assert (len(task.train), len(task.validation)) == (16, 4)
    assert f"rows.{suffix} (SHA-256 " in task.source


def test_a_missing_test_split_is_cut_the_same_way_each_time_and_shares_no_text(tmp_path: Path) -> None:
    doubled = pd.concat([REVIEWS, REVIEWS], ignore_index=True)
    path = write(tmp_path, doubled)
    task, again = load_task(path), load_task(path)
    assert task.fingerprint == again.fingerprint
    assert (len(task.train), len(task.validation)) == (32, 8)
    assert not {row.first for row in task.train} & {row.first for row in task.validation}
    assert "cut" in task.source


def test_pairs_scores_and_choices(tmp_path: Path) -> None:
    pairs = pd.DataFrame({"a": list("abcdefghij"), "b": list("klmnopqrst"), "score": [0.5 * n for n in range(10)]})
    task = load_task(write(tmp_path, pairs, kind="regression", text=["a", "b"], label="score"))
    assert task.spec.label_range == (0.0, 4.5)
    assert (task.train[0].first, task.train[0].second, task.train[0].label) == ("a", "k", 0.0)

    questions = pd.DataFrame({"q": [f"question {n}" for n in range(10)], "x": ["one"] * 10, "y": ["two"] * 10})
    questions["right"] = ["two", "0"] * 5
    columns = load_task(write(tmp_path, questions, kind="multiple_choice", text="q", label="right", choices=["x", "y"]))
    assert {row.label for row in columns.train} == {0, 1}
    listed = questions.assign(answers=[["one", "two"]] * 10)
    lists = load_task(
        write(tmp_path, listed, "jsonl", kind="multiple_choice", text="q", label="right", choices="answers")
    )
    assert lists.fingerprint == columns.fingerprint


def test_words_that_look_like_missing_numbers_are_texts(tmp_path: Path) -> None:
    frame = REVIEWS.assign(review=["NA", "null", "nan", *REVIEWS["review"][3:]])
    task = load_task(write(tmp_path, frame))
    assert {"NA", "null", "nan"} <= {row.first for row in (*task.train, *task.validation)}


WRONG: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], dict[str, Any], tuple[str, ...]]] = {
    "wrong column": (lambda frame: frame.rename(columns={"review": "body"}), {}, ("rows.csv", "review", "body")),
    "empty text": (lambda frame: frame.assign(review=["x", " ", *frame["review"][2:]]), {}, ("rows.csv", "row 1")),
    "one class": (lambda frame: frame.assign(stars="good"), {}, ("rows.csv", "'good'")),
    "unknown label": (lambda frame: frame, {"labels": ["good", "fair"]}, ("rows.csv", "row 1", "'bad'")),
    "score is no number": (lambda frame: frame, {"kind": "regression"}, ("rows.csv", "row 0", "'good'")),
    "no rows": (lambda frame: frame[:0], {}, ("rows.csv", "no rows")),
    "metric of another kind": (lambda frame: frame, {"metric": "pearson_spearman"}, ("reviews.toml", "metric")),
    "unknown key": (lambda frame: frame, {"colour": "red"}, ("reviews.toml", "colour")),
    "no table": (lambda frame: frame, {"train": None}, ("reviews.toml", "train")),
    "built-in name": (lambda frame: frame, {"name": "rte"}, ("reviews.toml", "'rte'")),
    "two classes wanted": (
        lambda frame: frame.assign(stars=["a", "b", "c", "d"] * 5),
        {"metric": "accuracy_f1"},
        ("accuracy_f1", "4"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line_with_file_and_row(tmp_path: Path, case: str) -> None:
    change, keys, expected = WRONG[case]
    path = write(tmp_path, change(REVIEWS), **keys)
    with pytest.raises(InvalidData) as refused:
        load_task(path)
    message = str(refused.value)
    assert "\n" not in message
    for word in expected:
        assert word in message, message


def test_rows_of_both_splits_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, REVIEWS[:12], test=REVIEWS[10:])
    with pytest.raises(InvalidData) as refused:
        load_task(path)
    assert "test.csv" in str(refused.value)
    assert "row 0" in str(refused.value)
    assert "2 of 10" in str(refused.value)


@pytest.mark.parametrize("missing", ["file.toml", "table"])
def test_missing_files_are_named(tmp_path: Path, missing: str) -> None:
    path = write(tmp_path, REVIEWS, train="gone.csv") if missing == "table" else str(tmp_path / "gone.toml")
    with pytest.raises(DataUnavailable, match="gone"):
        load_task(path)
