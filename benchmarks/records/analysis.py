"""What is declared of a results folder's analysis and is no part of a run: ``analysis.toml`` in the folder."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import Field, ValidationError

from benchmarks.protocols.frozen import Frozen
from benchmarks.records.store import RecordError

FILE = "analysis.toml"


class Analysis(Frozen):
    """The declaration.

    Attributes:
        looks: how often the runs are looked at, the last time included. Runs that are added after a look ask for the
            level of `benchmarks.statistics.intervals.level_at_each_of`, else the chance of an error grows.
    """

    looks: int = Field(default=1, ge=1, le=5)


def read_analysis(folder: Path) -> Analysis:
    """What the folder declares; the defaults without a file.

    Raises:
        RecordError: the file is no TOML, or declares something else.
    """
    path = folder / FILE
    if not path.is_file():
        return Analysis()
    try:
        return Analysis.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise RecordError(f"{path} is no declaration of an analysis: {error}") from error
