"""Records on disk: one JSON file per cell, and one parquet file with its per-example outcomes.

    <root>/records/<method>-s<seed>-<cell id>.json
    <root>/outcomes/<cell id>.parquet

Every file is written under a temporary name and renamed, outcomes first and the record last, so that a
process killed at any moment loses at most the cell it was writing.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import pandas as pd
import pyarrow as pa
from pydantic import ValidationError

from benchmarks.records.schema import SCHEMA_VERSION, Cell, RunRecord

OUTCOME_COLUMNS = ("task", "index", "label", "prediction", "correct")

Read = TypeVar("Read")


class RecordError(Exception):
    """A file of the store is damaged, foreign or of another version; the message names it and the way out."""


class Store:
    """The finished cells of one results folder.

    Args:
        root: the results folder. Nothing is created before the first `put`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records_folder = root / "records"
        self.outcomes_folder = root / "outcomes"

    def find(self, cell: Cell) -> RunRecord | None:
        """The record of `cell`, None when there is none; an unreadable file is an error, not a gap."""
        path = self._path(cell)
        return _if_there(read_record, path) if path.exists() else None

    def put(self, record: RunRecord, outcomes: pd.DataFrame | None = None) -> RunRecord:
        """Write one cell, in place of an earlier record of it.

        Args:
            record: what to keep; its `outcomes` field is set here.
            outcomes: one row per example with the columns `OUTCOME_COLUMNS`, None when nothing was predicted.

        Returns:
            The record as it was written.
        """
        cell = record.cell
        table = self.outcomes_folder / f"{cell.id}.parquet"
        written = record.model_copy(update={"outcomes": None if outcomes is None else table.name})
        text = _one_line_per_vector(written.model_dump_json(indent=2)) + "\n"
        # Python objects that JSON cannot hold (an infinite hyper-parameter) would come back as another cell.
        if RunRecord.model_validate_json(text).cell.id != cell.id:
            raise RecordError(
                f"the cell of {cell.method}, seed {cell.seed}, changes when it is written as JSON. "
                "Its protocol and config must hold finite numbers, strings, booleans, lists and dicts only."
            )
        target = self._path(cell)
        if outcomes is None:
            table.unlink(missing_ok=True)
        else:
            # Never pair an old record with new outcomes: killed from here on, the cell counts as not done.
            target.unlink(missing_ok=True)
            _write_outcomes(table, outcomes)
        with replacing(target) as file:
            file.write(text.encode())
        return written

    def all(self) -> list[RunRecord]:
        """Every record, sorted by protocol name, method and seed."""
        records = (_if_there(read_record, path) for path in sorted(self.records_folder.glob("*.json")))
        return sorted((record for record in records if record is not None), key=_order)

    def outcomes(self, record: RunRecord) -> pd.DataFrame:
        """The per-example outcomes of `record`."""
        cell = record.cell
        if record.outcomes is None:
            raise RecordError(
                f"the record of {cell.method}, seed {cell.seed} ({cell.id}, status {record.status}) has no "
                "per-example outcomes. Re-run the cell if they are needed."
            )
        # A record is data: whatever it says, only files of this store's own folder are read.
        path = self.outcomes_folder / Path(record.outcomes).name
        try:
            frame = pd.read_parquet(path)
        except (OSError, pa.ArrowException) as error:
            raise RecordError(
                f"cannot read the outcomes {path}: {error}. Delete {path.name} and the record "
                f"{_stem(cell)}-{cell.id}.json, then run the same command again."
            ) from error
        _check_columns(frame, str(path))
        return frame

    def _path(self, cell: Cell) -> Path:
        return self.records_folder / f"{_stem(cell)}-{cell.id}.json"


def read_record(path: Path) -> RunRecord:
    """Read and validate one record file; raises `RecordError` naming the file when it is not one."""
    text = _read(path)
    try:
        record = RunRecord.model_validate_json(text)
    except ValidationError as error:
        raise RecordError(f"{path} is not a valid record: {error}\n{_way_out(path)}") from error
    if not path.stem.endswith(f"-{record.cell.id}"):
        raise RecordError(
            f"{path} holds the cell {record.cell.id}, not the one in its name: it was renamed or edited. "
            f"{_way_out(path)}"
        )
    return record


def _if_there(read: Callable[[Path], Read], path: Path) -> Read | None:
    """What is read; None if another run has just taken the file away to write the cell anew: it is not done then."""
    try:
        return read(path)
    except RecordError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _read(path: Path) -> bytes:
    """The bytes of a file that holds a JSON object of this code's schema version."""
    try:
        text = path.read_bytes()
        data = json.loads(text)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read as JSON: {error}. {_way_out(path)}") from error
    if not isinstance(data, dict):
        raise RecordError(f"{path} holds a {type(data).__name__}, not a JSON object. {_way_out(path)}")
    version = data.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise RecordError(
            f"{path} has schema version {version!r}, this code reads {SCHEMA_VERSION}: another version of the project "
            f"wrote it. Use that version, or delete {path.name} and run the same command again."
        )
    return text


def _one_line_per_vector(text: str) -> str:
    """Indented JSON with its lists of numbers on one line each: a record with routing shrinks to a fifth."""

    def joined(match: re.Match[str]) -> str:
        return f"[{', '.join(match[1].split())}]".replace(",,", ",")

    # A line break cannot stand in a JSON string: this matches lists only.
    return re.sub(r"\[\n\s+((?:-?[0-9][0-9.eE+-]*,?\s+)+)\]", joined, text)


def _way_out(path: Path) -> str:
    return f"Delete {path.name} and run the same command again: the cell is then redone."


def _order(record: RunRecord) -> tuple[str, str, int, str]:
    cell = record.cell
    return cell.protocol.name, cell.method, cell.seed, cell.id


def _stem(cell: Cell) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', cell.method)}-s{cell.seed}"


def _check_columns(frame: pd.DataFrame, where: str) -> None:
    missing = [column for column in OUTCOME_COLUMNS if column not in frame.columns]
    if missing:
        raise RecordError(
            f"{where}: outcomes lack the columns {', '.join(missing)}; they have {', '.join(map(str, frame.columns))}."
        )


def _write_outcomes(path: Path, outcomes: pd.DataFrame) -> None:
    _check_columns(outcomes, path.name)
    with replacing(path) as file:
        outcomes.to_parquet(file, index=False, compression="zstd")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` at once when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unique per writer: two processes on the same cell each write a whole file, and the last rename wins.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
