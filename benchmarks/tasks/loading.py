"""Reads the rows of a public data set, from a local folder or from the hub, and checks every one of them.

A `Recipe` says where a task's rows are and how one row becomes an `Example`. With ``data_dir`` only the
folder is read, without it only the hub: neither stands in for the other, because the two may hold different
rows. What cannot be had raises `DataUnavailable`, what can be had but is wrong raises `InvalidData`.

Every text loses the white space at its two ends (SST-2 ends its sentences with a space, some MNLI hypotheses
too) and is otherwise left alone. An empty text is accepted, a missing one is not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Example, TaskData, TaskSpec

Row = Mapping[str, Any]
Builder = Callable[[Row], Example]


class DataUnavailable(RuntimeError):
    """The rows of a task cannot be had from where they were asked for; the message names the ways out."""


class InvalidData(ValueError):
    """Rows were found but cannot be used: damaged, none at all, a column missing, or a value out of range."""


class UnknownTask(KeyError):
    """No task of that name exists."""

    def __str__(self) -> str:
        # KeyError would print the message with quotes and escapes.
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class Split:
    """A split by its name, on the hub and as a file, and the number of rows it has upstream."""

    name: str
    official_rows: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """Where the rows of one task are and how they are read.

    Attributes:
        spec: the task.
        folder: where its files are below the data folder, e.g. ``glue/rte``.
        hub_id: repository on the hub, e.g. ``nyu-mll/glue``.
        hub_config: configuration of that repository, ``None`` where it has only one.
        columns: the columns `build` reads; others are not loaded.
        build: turns a row into an example, raises `BadValue` for a value it cannot use.
        train: the split that may be trained on.
        reported: the labelled split whose scores are reported.
        revision: commit, tag or branch on the hub; ``None`` takes the newest. The fingerprint of the rows is
            recorded with every result, so a revision that changes them cannot go unnoticed.
    """

    spec: TaskSpec
    folder: str
    hub_id: str
    hub_config: str | None
    columns: tuple[str, ...]
    build: Builder
    train: Split
    reported: Split
    revision: str | None = None

    @property
    def hub_name(self) -> str:
        """The data set as it is called in captions and messages."""
        return f"{self.hub_id} {self.hub_config}" if self.hub_config else self.hub_id


class BadValue(ValueError):
    """One value of a row is unusable; the reader adds the file and the row number."""

    def __init__(self, column: str, got: object, wanted: str) -> None:
        super().__init__(f"column {column!r} holds {got!r}, wanted {wanted}")


def text(row: Row, column: str) -> str:
    """The text of a column without white space at its ends."""
    value = row[column]
    if not isinstance(value, str):
        raise BadValue(column, value, "a text")
    return value.strip()


def class_index(row: Row, column: str, names: Sequence[str]) -> int:
    """A class index, checked against the number of classes (unlabelled test splits of the hub have -1)."""
    value = row[column]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(names):
        raise BadValue(column, value, f"an integer from 0 to {len(names) - 1} ({', '.join(names)})")
    return value


def bounded_score(row: Row, column: str, low: float, high: float) -> float:
    """A regression label within its range."""
    value = row[column]
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    if not usable or not math.isfinite(value) or not low <= value <= high:
        raise BadValue(column, value, f"a number from {low:g} to {high:g}")
    return float(value)


def choice_index(row: Row, column: str, labels: Sequence[str]) -> int:
    """Position of the right answer's label among the labels of the row's own choices."""
    value = row[column]
    if value not in labels:
        raise BadValue(column, value, f"one of {', '.join(labels)}")
    return labels.index(value)


def load(recipe: Recipe, data_dir: Path | None) -> TaskData:
    """Reads and checks both splits of a task.

    Raises:
        DataUnavailable: the folder lacks a file, or the hub does not give the data set.
        InvalidData: a file is damaged or empty, lacks a column or holds a value out of range.
    """
    splits = (recipe.train, recipe.reported)
    train, reported = (_examples(recipe, split, data_dir) for split in splits)
    counts = [_count(split, len(rows)) for split, rows in zip(splits, (train, reported), strict=True)]
    place = "" if data_dir is None else " from local files"
    return TaskData(
        spec=recipe.spec,
        train=train,
        validation=reported,
        source=f"{recipe.hub_name}{place}, {' and '.join(counts)} rows",
        fingerprint=fingerprint(train, reported),
    )


def fingerprint(train: Iterable[Example], validation: Iterable[Example]) -> str:
    """SHA-256 over all rows as canonical JSON, one line each: equal exactly when rows and their order are."""
    digest = hashlib.sha256()
    for split, rows in (("train", train), ("validation", validation)):
        for row in rows:
            line = [split, row.first, row.second, row.choices, row.label]
            digest.update(json.dumps(line, separators=(",", ":"), ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def _count(split: Split, rows: int) -> str:
    if rows == split.official_rows:
        return f"{rows:,} {split.name}"
    relation = "subset of" if rows < split.official_rows else "officially"
    return f"{rows:,} {split.name} ({relation} {split.official_rows:,})"


def _examples(recipe: Recipe, split: Split, data_dir: Path | None) -> tuple[Example, ...]:
    if data_dir is None:
        origin = f"{recipe.hub_name}, split {split.name}"
        rows = _hub_rows(recipe, split, origin)
    else:
        path = Path(data_dir) / recipe.folder / f"{split.name}.parquet"
        origin = str(path)
        rows = _file_rows(recipe, path)
    if not rows:
        raise InvalidData(f"{origin} has no rows; replace it with a complete copy.")
    return tuple(_example(recipe, row, number, origin) for number, row in enumerate(rows))


def _example(recipe: Recipe, row: Row, number: int, origin: str) -> Example:
    try:
        return recipe.build(row)
    except BadValue as problem:
        raise InvalidData(
            f"{origin}, row {number} (the first is 0): {problem}. "
            f"Task {recipe.spec.name} needs the columns and labels of {recipe.hub_name}."
        ) from None


def _file_rows(recipe: Recipe, path: Path) -> list[dict[str, Any]]:
    # pyarrow rather than `datasets`: no copy of every file in a cache folder, and no second to import it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataUnavailable(
            f"Task {recipe.spec.name} needs {path}, which does not exist. As a data folder was given, the "
            f"hub was not tried. {_ways_out(recipe)}"
        )
    try:
        with pq.ParquetFile(path) as file:
            _require_columns(recipe, file.schema_arrow.names, str(path))
            rows: list[dict[str, Any]] = file.read(columns=list(recipe.columns)).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InvalidData(f"{path} cannot be read as Parquet: {error}. Replace it with a complete copy.") from error
    return rows


def _hub_rows(recipe: Recipe, split: Split, origin: str) -> list[dict[str, Any]]:
    import datasets

    try:
        table = datasets.load_dataset(recipe.hub_id, recipe.hub_config, split=split.name, revision=recipe.revision)
    except Exception as error:
        # Everything, because the errors of the hub client and of its transport share no base class.
        raise DataUnavailable(
            f"Task {recipe.spec.name}: the hub did not give {origin} ({type(error).__name__}: {error}). "
            f"As no data folder was given, no local file was tried. {_ways_out(recipe)}"
        ) from error
    _require_columns(recipe, table.column_names, origin)
    rows: list[dict[str, Any]] = table.select_columns(list(recipe.columns)).to_list()
    return rows


def _require_columns(recipe: Recipe, found: Sequence[str], origin: str) -> None:
    missing = [column for column in recipe.columns if column not in found]
    if missing:
        raise InvalidData(
            f"{origin} lacks the column {', '.join(missing)}; it has {', '.join(found) or 'none'}. "
            f"Task {recipe.spec.name} needs the columns of {recipe.hub_name}: {', '.join(recipe.columns)}."
        )


def _ways_out(recipe: Recipe) -> str:
    files = " and ".join(f"{recipe.folder}/{split.name}.parquet" for split in (recipe.train, recipe.reported))
    return (
        f"Either give --data-dir FOLDER with {files} in it (columns {', '.join(recipe.columns)}), or leave "
        f"--data-dir out and run with access to the hub, HF_HUB_OFFLINE unset, to load {recipe.hub_name}."
    )
