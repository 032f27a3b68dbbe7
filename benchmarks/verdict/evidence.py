"""All that an answer may rest on: the suites, the mechanisms, the tables of speed, of one results root."""

from __future__ import annotations

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
from benchmarks.mechanisms.tables import compare_pairs
from benchmarks.records.comparable import Group
from benchmarks.records.frame import Results
from benchmarks.reporting.comparison import comparison_table
from benchmarks.reporting.endpoint import Endpoint
from benchmarks.reporting.page.data import gather_tables
from benchmarks.reporting.views import choose_reference

UNHEARD = 1e-6
"""A method whose score changes by less with wrong ids does not listen to ids."""

SAME = 0.01
"""Smaller differences of R2 count as none, however certain they are."""


class Strength(StrEnum):
    """How much an answer rests on."""

    DECIDED = "decided"
    PARTLY = "partly decided"
    UNDECIDED = "undecided"
    COUNTED = "counted"
    MEASURED = "measured on one machine"
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
    """

    folder: Path
    group: Group
    frame: pd.DataFrame
    compared: pd.DataFrame | None
    reference: str | None

    @property
    def steps(self) -> int:
        """Of every run."""
        return self.group.protocol.steps


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
class Evidence:
    """Everything below one results root.

    Attributes:
        root: with a folder for each suite, and `mechanisms`, `speed*` and `tables`.
    """

    root: Path

    @cached_property
    def studies(self) -> list[Study]:
        """All protocols of all folders, the longest runs first.

        Raises:
            RecordError: a record is damaged.
        """
        folders = sorted(path.parent for path in self.root.glob("*/records"))
        found = [study for folder in folders for study in _load_studies(folder)]
        return sorted(found, key=lambda study: -study.steps)

    @cached_property
    def mechanisms(self) -> dict[str, Mechanism]:
        """Experiments by name.

        Raises:
            Incomplete: a run is missing.
        """
        folder = self.root / "mechanisms"
        if not has_archive(folder):
            return {}
        archive = Archive(folder)
        return {
            asked.experiment.name: Mechanism(asked, read_asked_frame(asked, archive)) for asked in read_asked(folder)
        }

    @cached_property
    def speed(self) -> list[dict[str, Any]]:
        """Finished tables of `benchmarks.speed`."""
        return [dict(table) for folder in sorted(self.root.glob("speed*/tables")) for table in gather_tables(folder)]

    @cached_property
    def counts(self) -> pd.DataFrame:
        """The table of `benchmarks.claims`: published parameter counts with their verdicts."""
        tables = gather_tables(self.root / "tables")
        rows = [dict(zip(table["columns"], row, strict=True)) for table in tables for row in table["rows"]]
        return pd.DataFrame(rows)

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
        table = None
        if reference is not None:
            outcomes = results.outcomes(group.key)
            band = protocol.equivalence_band / 100
            table = comparison_table(own, outcomes, reference, band, Endpoint.of(protocol))
        studies.append(Study(folder, group, own, None if table is None else table.data, reference))
    return studies


def merges(method: str) -> bool:
    """Whether a method's update folds into the weights, for all tasks or for each."""
    return moepeft.method(method, num_tasks=2).capabilities.not_mergeable is None


def find_best(rows: pd.DataFrame) -> tuple[str, list[str], list[str]]:
    """The method with the highest mean score on one teacher, those that are as good, and those below it.

    Below: decided, and by `SAME` or more. As good: all others.

    Args:
        rows: of the long frame, of one teacher and of the methods that may win.
    """
    means = rows.groupby("method")["score"].mean()
    best = str(means.idxmax())
    pairs = compare_pairs(rows)
    is_below = (pairs["better"] == best) & pairs["decided"] & (pairs["difference"] >= SAME)
    below = pairs[is_below]["worse"].tolist()
    others = [str(name) for name in means.sort_values(ascending=False).index if name != best]
    return best, [name for name in others if name not in below], [name for name in others if name in below]
