"""From the archive of a results folder to the tables and figures of every experiment that was asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks.mechanisms.asked import Asked, read_asked
from benchmarks.mechanisms.experiments import Experiment
from benchmarks.mechanisms.figures import can_draw, draw_scores
from benchmarks.mechanisms.frame import read_choices, read_frame
from benchmarks.mechanisms.runs import ARCHIVE, Archive
from benchmarks.mechanisms.tables import mechanism_tables
from benchmarks.records.schema import Provenance
from benchmarks.reporting.build import COMMAND, Report, name_folder
from benchmarks.reporting.render import Table, to_csv, to_markdown


def has_archive(root: Path) -> bool:
    """Whether a results folder holds runs of the mechanisms."""
    return (root / ARCHIVE).is_file()


def build_mechanisms(root: Path) -> Report:
    """What the folder should hold, from its archive alone; nothing is run or written.

    Raises:
        Incomplete: a run that a table needs is not in the archive.
        RecordError: a file is damaged.
    """
    archive = Archive(root)
    machines = archive.machines()
    files: dict[str, bytes] = {}
    figures: dict[str, Callable[[], bytes]] = {}
    texts = [f"## {name_folder(root)}\n"]
    for asked in read_asked(root):
        frame = read_asked_frame(asked, archive)
        header = f"Written by `{COMMAND} --results {name_folder(root)}` from runs with SHA-256 {_hash(frame, archive)}"
        caption = _caption(asked, frame, machines)
        for table in mechanism_tables(asked.experiment, frame):
            texts.append(to_markdown(table, caption))
            files |= _files(asked.experiment, table, header, texts[-1])
        if can_draw(asked.experiment):
            figures[f"figures/{asked.experiment.name}.svg"] = partial(draw_scores, asked.experiment, frame, header)
    return Report(files, figures, "\n".join(texts), "", ())


def read_asked_frame(asked: Asked, archive: Archive) -> pd.DataFrame:
    """The long frame (`read_frame`) of an experiment that was run to its end.

    Raises:
        Incomplete: a run is missing.
    """
    return read_frame(asked.experiment, read_choices(asked.experiment, asked.methods, archive), archive)


def _files(experiment: Experiment, table: Table, header: str, text: str) -> dict[str, bytes]:
    csv = f"# {header}\n{to_csv([(experiment.name, table)])}"
    return {
        f"tables/{table.name}.md": f"<!-- {header} -->\n\n{text}".encode(),
        f"tables/{table.name}.csv": csv.encode(),
    }


def _hash(frame: pd.DataFrame, archive: Archive) -> str:
    """Of the outcomes behind a frame, whatever their order."""
    outcomes = (archive.read(run).model_dump_json() for run in sorted(set(frame["run"])))
    return hashlib.sha256("\n".join(outcomes).encode()).hexdigest()


def _caption(asked: Asked, frame: pd.DataFrame, machines: Mapping[str, Provenance]) -> tuple[str, ...]:
    made = [machines[key] for key in sorted(set(frame["machine"])) if key in machines]
    places = sorted({f"{one.device}, one thread a run; torch {one.packages['torch']}" for one in made})
    commits = sorted({f"{(one.commit or 'unknown')[:10]}{' with changes' if one.dirty else ''}" for one in made})
    return (
        *(f"{place}." for place in places),
        f"Code: commit {', commit '.join(commits)}.",
        f"Made by `{asked.command}`.",
    )
