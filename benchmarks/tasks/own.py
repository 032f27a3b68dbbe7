"""Own data: a task from a TOML file and tables beside it, in place of a module of this package.

    name = "reviews"
    kind = "classification"          # or regression, multiple_choice
    text = "review"                  # one column, or a list of two
    label = "stars"
    train = "reviews.csv"            # CSV, JSONL or parquet, beside the TOML file
    test = "reviews-test.csv"        # without it, a fifth of the training rows is cut and said so

Every row is checked, as the rows of built-in tasks are. A message names the file and the row.
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from benchmarks.protocols.seeds import generator

from .base import Example, Kind, TaskData, TaskSpec
from .loading import DataUnavailable, InvalidData, fingerprint

TEST_SHARE = 5  # one row of so many is cut for the test split where there is none

_READERS: Mapping[str, Callable[[Path], pd.DataFrame]] = {
    # Texts stay texts: "NA" and an empty field are no missing numbers.
    ".csv": lambda path: pd.read_csv(path, dtype=object, keep_default_na=False),
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False, convert_dates=False),
    ".parquet": pd.read_parquet,
}
_METRIC: Mapping[Kind, str] = {
    "classification": "accuracy",
    "regression": "pearson_spearman",
    "multiple_choice": "accuracy",
}
_METRICS: Mapping[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "accuracy_f1", "matthews"),
    "regression": ("pearson_spearman",),
    "multiple_choice": ("accuracy",),
}


class OwnTask(BaseModel):
    """The content of a task's file.

    Attributes:
        name: on the command line and in tables.
        kind: what is predicted.
        text: column of the text, or the two columns of a pair.
        label: column of the class, the score, or the right choice (its position from 0, or its text).
        train: table of the rows that may be trained on.
        test: table of the rows that are reported.
        hub: id of a data set on the hub, in place of `train` and `test`.
        metric: one that suits the kind; default: the kind's first.
        labels: classes in order; default: those of the training rows, sorted.
        choices: columns of a multiple-choice row's answers, or the one column that holds their list.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
    kind: Kind
    text: str | Annotated[tuple[str, ...], Field(min_length=1, max_length=2)]
    label: str
    train: str | None = None
    test: str | None = None
    hub: str | None = None
    metric: str | None = None
    labels: tuple[str, ...] = ()
    choices: str | Annotated[tuple[str, ...], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.train is None) == (self.hub is None):
            raise ValueError("give either train (a file beside this one) or hub (the id of a data set)")
        if (self.kind == "multiple_choice") != (self.choices is not None):
            raise ValueError(
                "choices (columns, or one column of lists) belongs to kind = multiple_choice, and to no other"
            )
        if self.labels and self.kind != "classification":
            raise ValueError("labels belongs to kind = classification")
        if self.metric is not None and self.metric not in _METRICS[self.kind]:
            raise ValueError(f"metric {self.metric!r}: kind {self.kind} has {', '.join(_METRICS[self.kind])}")
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of the text."""
        return (self.text,) if isinstance(self.text, str) else self.text

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        choices = (self.choices,) if isinstance(self.choices, str) else self.choices or ()
        return (*self.texts, *choices, self.label)


def is_task_file(name: str) -> bool:
    """Whether a word of the command line means a file and not the name of a built-in task."""
    return name.endswith(".toml")


def load_own(path: Path) -> TaskData:
    """Read a task's file and its tables.

    Raises:
        DataUnavailable: a file does not exist, or the hub does not give the data set.
        InvalidData: the file or a row cannot be used; the message names the file and the row.
    """
    task = read_task_file(path)
    tables = _hub_tables(task) if task.hub is not None else _file_tables(task, path.parent)
    train_name, train = tables[0]
    labels = task.labels or _classes(task, train, train_name)
    examples = [tuple(_examples(task, frame, name, labels)) for name, frame in tables]
    cut = len(examples) == 1
    if cut:
        examples = list(_cut(task.name, examples[0], train_name))
    _refuse_shared_rows(examples[0], examples[1], train_name, tables[-1][0])
    spec = _spec(task, labels, [float(row.label) for rows in examples for row in rows])
    counts = f"{len(examples[0]):,} train and {len(examples[1]):,} test rows"
    note = " (test rows cut from the training rows: there was no test file)" if cut else ""
    return TaskData(
        spec=spec,
        train=examples[0],
        validation=examples[1],
        source=f"{' and '.join(name for name, _ in tables)}, {counts}{note}",
        fingerprint=fingerprint(*examples),
    )


def read_task_file(path: Path) -> OwnTask:
    """The content of a task's file, checked.

    Raises:
        DataUnavailable: there is no such file.
        InvalidData: the file is no TOML, or a key is wrong.
    """
    if not path.is_file():
        raise DataUnavailable(
            f"{path} does not exist: --tasks takes names of tasks and TOML files that describe own ones"
        )
    try:
        return OwnTask.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidData(f"{path}: not a TOML file: {error}") from error
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, one['loc'])) or 'file'}: {one['msg']}" for one in error.errors())
        raise InvalidData(f"{path}: {'; '.join(dict.fromkeys(problems))}") from error


# ---------------------------------------------------------------------- tables


def _file_tables(task: OwnTask, folder: Path) -> list[tuple[str, pd.DataFrame]]:
    return [_file_table(task, folder / name) for name in (task.train, task.test) if name is not None]


def _file_table(task: OwnTask, path: Path) -> tuple[str, pd.DataFrame]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise InvalidData(f"{path}: wanted a file that ends in {', '.join(_READERS)}")
    if not path.is_file():
        raise DataUnavailable(f"task {task.name} needs {path}, which does not exist")
    try:
        frame = reader(path)
    except (ValueError, OSError) as error:
        raise InvalidData(f"{path} cannot be read: {error}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return f"{path.name} (SHA-256 {digest})", _checked(task, frame, str(path))


def _hub_tables(task: OwnTask) -> list[tuple[str, pd.DataFrame]]:
    import datasets

    try:
        loaded = datasets.load_dataset(task.hub)
    except Exception as error:  # the errors of the hub's client and of its transport share no base class
        raise DataUnavailable(
            f"task {task.name}: the hub did not give {task.hub} ({type(error).__name__}: {error})"
        ) from error
    names = ["train", *(["test"] if "test" in loaded else [])]
    return [
        (f"{task.hub}, split {name}", _checked(task, loaded[name].to_pandas(), f"{task.hub}, {name}")) for name in names
    ]


def _checked(task: OwnTask, frame: pd.DataFrame, origin: str) -> pd.DataFrame:
    missing = [column for column in task.columns if column not in frame.columns]
    if missing:
        raise InvalidData(
            f"{origin} lacks the column {', '.join(missing)}; it has {', '.join(map(str, frame.columns)) or 'none'}"
        )
    if frame.empty:
        raise InvalidData(f"{origin} has no rows")
    return frame


# ---------------------------------------------------------------------- rows


def _classes(task: OwnTask, frame: pd.DataFrame, origin: str) -> tuple[str, ...]:
    if task.kind != "classification":
        return ()
    found = sorted({str(value).strip() for value in frame[task.label]})
    if len(found) < 2:
        raise InvalidData(f"{origin}: column {task.label!r} holds one class only, {found[0]!r}; wanted two at least")
    return tuple(found)


def _examples(task: OwnTask, frame: pd.DataFrame, origin: str, labels: Sequence[str]) -> list[Example]:
    rows = []
    for number, row in enumerate(frame[list(dict.fromkeys(task.columns))].to_dict("records")):
        try:
            rows.append(_example(task, row, labels))
        except ValueError as problem:
            raise InvalidData(f"{origin}, row {number} (the first is 0): {problem}") from None
    return rows


def _example(task: OwnTask, row: Mapping[Any, Any], labels: Sequence[str]) -> Example:
    first, *rest = (_text(row[column], column) for column in task.texts)
    choices = _choices(task, row)
    return Example(first, rest[0] if rest else None, choices, _label(task, row[task.label], labels or choices))


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {column!r} holds {value!r}, wanted a text that is not empty")
    return value.strip()


def _choices(task: OwnTask, row: Mapping[Any, Any]) -> tuple[str, ...]:
    if task.choices is None:
        return ()
    if not isinstance(task.choices, str):
        return tuple(_text(row[column], column) for column in task.choices)
    listed = row[task.choices]
    if isinstance(listed, str) or not hasattr(listed, "__iter__") or len(listed) < 2:
        raise ValueError(f"column {task.choices!r} holds {listed!r}, wanted a list of two answers at least")
    return tuple(_text(value, task.choices) for value in listed)


def _label(task: OwnTask, value: Any, known: Sequence[str]) -> int | float:
    if task.kind == "regression":
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"column {task.label!r} holds {value!r}, wanted a finite number")
        return number
    word = str(value).strip()
    if word in known:
        return list(known).index(word)
    if task.kind == "multiple_choice" and word.isdecimal() and int(word) < len(known):
        return int(word)
    raise ValueError(f"column {task.label!r} holds {value!r}, wanted one of {', '.join(map(repr, known))}")


def _cut(name: str, rows: Sequence[Example], origin: str) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Training and test rows. Rows with the same texts stay together, so that no test row was trained on."""
    groups = list(dict.fromkeys((row.first, row.second, row.choices) for row in rows))
    order = generator("own test", name).permutation(len(groups))
    tested = {groups[at] for at in order[: max(1, len(groups) // TEST_SHARE)]}
    parts: tuple[list[Example], list[Example]] = ([], [])
    for row in rows:
        parts[(row.first, row.second, row.choices) in tested].append(row)
    if not parts[0]:
        raise InvalidData(f"{origin} has too few different rows to cut a test split from; give test = FILE")
    return tuple(parts[0]), tuple(parts[1])


def _refuse_shared_rows(train: Sequence[Example], test: Sequence[Example], train_name: str, test_name: str) -> None:
    seen = {(row.first, row.second, row.choices): number for number, row in enumerate(train)}
    shared = [
        (number, seen[row.first, row.second, row.choices])
        for number, row in enumerate(test)
        if (row.first, row.second, row.choices) in seen
    ]
    if shared:
        own, other = shared[0]
        raise InvalidData(
            f"{test_name}, row {own} (the first is 0): the same texts are row {other} of {train_name}; {len(shared)} "
            f"of {len(test)} test rows are in both. Remove them from one of the two"
        )


def _spec(task: OwnTask, labels: Sequence[str], values: Sequence[float]) -> TaskSpec:
    bounds = None
    if task.kind == "regression":
        bounds = (min(values), max(values))
        if bounds[0] == bounds[1]:
            raise InvalidData(f"task {task.name}: all scores are {bounds[0]:g}; wanted two different ones at least")
    metric = task.metric or _METRIC[task.kind]
    if metric == "accuracy_f1" and len(labels) != 2:
        raise InvalidData(f"task {task.name}: metric accuracy_f1 is for two classes, got {len(labels)}")
    return TaskSpec(task.name, task.kind, tuple(labels), metric, label_range=bounds)
