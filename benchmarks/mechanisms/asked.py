"""What was asked of the mechanisms: with the archive beside it, enough to write every table again."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.mechanisms.experiments import Experiment
from benchmarks.records.store import RecordError, replacing

FOLDER = "asked"


class Asked(BaseModel):
    """One experiment that was run to its end.

    Attributes:
        experiment: resolved: with the command line's steps and seeds.
        methods: of the command line.
        command: as it was typed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiment: Experiment
    methods: tuple[str, ...]
    command: str


def write_asked(root: Path, asked: Asked) -> None:
    """Note an experiment beside the archive; a later one of the same name takes its place."""
    with replacing(root / FOLDER / f"{asked.experiment.name}.json") as file:
        file.write(asked.model_dump_json(indent=1).encode())


def read_asked(root: Path) -> list[Asked]:
    """All experiments of a results folder, by name.

    Raises:
        RecordError: a file is damaged.
    """
    found = []
    for path in sorted((root / FOLDER).glob("*.json")):
        try:
            found.append(Asked.model_validate_json(path.read_bytes()))
        except ValidationError as error:
            raise RecordError(
                f"{path} is damaged ({error.error_count()} fields); run its experiment again: no run is made twice"
            ) from error
    return found
