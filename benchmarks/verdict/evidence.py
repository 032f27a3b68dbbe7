"""All that an answer may rest on: the suites, the mechanisms, the tables of speed, of one results root."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

import moepeft
from benchmarks.mechanisms.asked import Asked, read_asked
from benchmarks.mechanisms.build import has_archive, read_asked_frame
from benchmarks.mechanisms.runs import Archive
from benchmarks.records.comparable import Group
from benchmarks.records.frame import Results
from benchmarks.reporting.comparison import comparison_table
from benchmarks.reporting.endpoint import Endpoint
from benchmarks.reporting.page.data import gather_tables
from benchmarks.reporting.render import SPEED_OF
from benchmarks.reporting.views import choose_reference

UNHEARD = 1e-6
"""A method whose score changes by less with wrong ids does not listen to ids."""


MERGED = " (merged)"


class Strength(StrEnum):
    """How much an answer rests on."""

    DECIDED = "decided"
    PARTLY = "partly decided"
    UNDECIDED = "undecided"
    COUNTED = "counted"
    MEASURED = "measured"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Link:
    """Where the numbers of an answer stand.

    Attributes:
        text: as shown.
        path: below the results root.
    """

    text: str
    path: str

    @property
    def folder(self) -> str:
        """The results folder."""
        return self.path.partition("/")[0]


@dataclass(frozen=True)
class Answer:
    """To one question.

    Attributes:
        question: as people ask it.
        choice: the methods to take, in a few words.
        sentences: one fact each.
        evidence: tables that the facts are from.
        strength: of the answer.
    """

    question: str
    choice: str
    sentences: tuple[str, ...]
    evidence: tuple[Link, ...]
    strength: Strength


@dataclass(frozen=True)
class Study:
    """The runs of one protocol in one folder.

    Attributes:
        folder: of the results.
        group: the runs.
        frame: their long frame.
        compared: every method against the reference (`comparison_table`); None where nothing is compared.
        reference: label of the reference.
        outcomes: predictions of single test rows.
        endpoint: what is compared.
    """

    folder: Path
    group: Group
    frame: pd.DataFrame
    compared: pd.DataFrame | None
    reference: str | None
    outcomes: pd.DataFrame
    endpoint: Endpoint

    @property
    def steps(self) -> int:
        """Of every run."""
        return self.group.protocol.steps

    @property
    def contradicts(self) -> bool:
        """Whether its tasks answer the same texts differently, under one head."""
        return self.group.protocol.heads == "shared"


@dataclass(frozen=True)
class Mechanism:
    """One experiment of the mechanisms.

    Attributes:
        asked: the experiment.
        frame: its long frame.
    """

    asked: Asked
    frame: pd.DataFrame

    def at(self, **where: Any) -> pd.DataFrame:
        """The rows of one teacher."""
        chosen = pd.Series(data=True, index=self.frame.index)
        for field, value in where.items():
            chosen &= self.frame[field] == value
        return self.frame[chosen]

    @property
    def seeds(self) -> int:
        """Number of seeds of every method."""
        return len(self.asked.experiment.seeds)

    @property
    def oracle(self) -> str:
        """The method that shares nothing."""
        return self.asked.experiment.oracle

    def deaf(self) -> list[str]:
        """Methods that do not listen to ids: wrong ids change no score of any run."""
        lost = self.frame.dropna(subset=["swap_loss"]).groupby("method", sort=False)["swap_loss"]
        return [str(name) for name, values in lost if values.abs().max() < UNHEARD]


@dataclass(frozen=True)
class Merged:
    """Inference by merged adapters, beside the frozen model, in one table of `benchmarks.speed`.

    Attributes:
        words: all ratios, in a sentence without its end.
        ratios: (low, high) 95 % bounds of the time over the reference's, by method and for ``frozen``.
        link: to the table.
    """

    words: str
    ratios: Mapping[str, tuple[float, float]]
    link: Link


@dataclass(frozen=True)
class Evidence:
    """Everything below one results root.

    Attributes:
        root: with a folder for each suite, and `mechanisms`, `speed*` and `tables`.
        without: names of folders that are left out.
    """

    root: Path
    without: frozenset[str] = frozenset()

    def folders(self, pattern: str) -> list[Path]:
        """The folders below the root whose name and content agree with the pattern ``name/content``."""
        return sorted(path.parent for path in self.root.glob(pattern) if path.parent.name not in self.without)

    @cached_property
    def studies(self) -> list[Study]:
        """All protocols of all folders, the longest runs first.

        Raises:
            RecordError: a record is damaged.
        """
        found = [study for folder in self.folders("*/records") for study in _load_studies(folder)]
        return sorted(found, key=lambda study: -study.steps)

    @cached_property
    def mechanisms(self) -> dict[str, Mechanism]:
        """Experiments by name.

        Raises:
            Incomplete: a run is missing.
        """
        folder = self.root / "mechanisms"
        if folder.name in self.without or not has_archive(folder):
            return {}
        archive = Archive(folder)
        return {
            asked.experiment.name: Mechanism(asked, read_asked_frame(asked, archive)) for asked in read_asked(folder)
        }

    @cached_property
    def speed(self) -> list[dict[str, Any]]:
        """Finished tables of `benchmarks.speed`, titled with the model that they are of."""
        folders = self.folders("speed*/tables")
        tables = [table for folder in folders for table in gather_tables(folder / "tables")]
        return [{**table, "title": f"{table['title']} ({table['under'].removeprefix(SPEED_OF)})"} for table in tables]

    @cached_property
    def counts(self) -> pd.DataFrame:
        """The table of `benchmarks.claims`: published parameter counts with their verdicts."""
        tables = gather_tables(self.root / "tables")
        rows = [dict(zip(table["columns"], row, strict=True)) for table in tables for row in table["rows"]]
        return pd.DataFrame(rows)

    @property
    def merged(self) -> list[Merged]:
        """What merged adapters cost at inference, from the tables that have such rows."""
        return [_read_merged(table, self.link(table)) for table in self.speed if _has_merged(table)]

    def link(self, table: Mapping[str, Any]) -> Link:
        """To a finished table."""
        return Link(str(table["title"]), Path(table["file"]).relative_to(self.root).as_posix())

    def find_studies(self, suite: str) -> list[Study]:
        """Protocols of one suite in which methods are compared."""
        return [one for one in self.studies if one.group.protocol.name == suite and one.compared is not None]


def _load_studies(folder: Path) -> list[Study]:
    results = Results.load(folder)
    frame = results.frame()
    studies = []
    for group in results.groups():
        own = frame[frame["protocol_id"] == group.key]
        protocol = group.protocol
        reference = choose_reference(own, protocol.reference)
        table, outcomes, endpoint = None, results.outcomes(group.key), Endpoint.of(protocol, results)
        if reference is not None:
            table = comparison_table(own, outcomes, reference, protocol.equivalence_band / 100, endpoint)
        studies.append(Study(folder, group, own, None if table is None else table.data, reference, outcomes, endpoint))
    return studies


def ratio_column(table: Mapping[str, Any]) -> str | None:
    """The column of times over those of the reference, where a table of `benchmarks.speed` has one."""
    return next((column for column in table["columns"] if column.startswith("x ")), None)


def _has_merged(table: Mapping[str, Any]) -> bool:
    return ratio_column(table) is not None and any(MERGED in row[0] for row in table["rows"])


def _read_merged(table: Mapping[str, Any], link: Link) -> Merged:
    at = table["columns"].index(ratio_column(table))
    cells = {row[0].removesuffix(MERGED): row[at] for row in table["rows"] if MERGED in row[0] or row[0] == "frozen"}
    bounds = {name: [float(number) for number in re.findall(r"[\d.]+", cell)] for name, cell in cells.items()}
    told = ", ".join(f"{name} {cell}" for name, cell in cells.items() if name != "frozen")
    words = (
        f"{table['title']}, merged, {table['columns'][at].removeprefix('x ')} as 1: {told}; frozen {cells['frozen']}"
    )
    return Merged(words, {name: (numbers[1], numbers[2]) for name, numbers in bounds.items()}, link)


def merges(method: str) -> bool:
    """Whether a method's update folds into the weights, for all tasks or for each."""
    return moepeft.method(method, num_tasks=2).capabilities.not_mergeable is None
