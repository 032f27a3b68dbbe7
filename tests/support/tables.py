"""What the tests of tables and figures share: folders of records, frames of records in memory, cells of a table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.records.comparable import Group
from benchmarks.records.frame import Results
from benchmarks.records.schema import RunRecord, Score
from benchmarks.records.store import Store
from tests.support.record_factory import make_record

SKILLS = {"majority": 0.5, "head": 0.6, "alpha": 0.7, "bravo": 0.9, "charlie": 0.7}


def fill(root: Path, seeds: tuple[int, ...] = (0, 1, 2), **changes) -> Store:
    """A results folder with five methods."""
    store = Store(root)
    for method, skill in SKILLS.items():
        for seed in seeds:
            store.put(*make_record(method, seed, skill=skill, **changes))
    return store


def with_scores(record: RunRecord, **values: float | None) -> RunRecord:
    """The record with the given primary scores, by task, out of 100 rows; all other tasks keep theirs."""
    scores = dict(record.scores)
    for task, value in values.items():
        scores[task] = Score(metrics={"accuracy": value}, primary="accuracy", rows=100)
    return record.model_copy(update={"scores": scores})


def only_group(*records: RunRecord) -> Group:
    (group,) = Results(records).groups()
    return group


def frame_of(*records: RunRecord) -> pd.DataFrame:
    """The long frame of records of one protocol."""
    return Results(records).frame()


def row_of(frame: pd.DataFrame, method: str) -> dict:
    (row,) = frame[frame["method"] == method].to_dict("records")
    return row
