"""Published parameter counts beside ours, under every convention: ``python -m benchmarks.claims``.

Papers divide by the number of tasks and differ in what they leave out. Each published count (`published.toml`, with
its source) is compared with ours under three named conventions, in millions and in units of 2^20, on modules of the
true shapes on the meta device. A verdict says which convention reproduces it to the printed digit. Where none does, the
rows of one published table are searched for a setting that would explain all of them at once; the verdict says what
was searched.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from tabulate import tabulate
from torch import nn

import moepeft
from benchmarks.backbones.shapes import build_shape
from moepeft.counting import ParameterCount, count_added_by_task

PUBLISHED = Path(__file__).with_name("published.toml")
CONVENTIONS = ("all trainable", "without task tables", "adapter core only")

# What is searched for counts that no convention explains: sites of LLaMA, ranks, numbers of tasks.
SITE_SETS = ("q", "v", "q v", "q k v", "q k v o", "up down", "gate up down", "q v up down", "q k v o gate up down")
RANKS = (2, 4, 8, 16, 32, 64)
TASKS = range(1, 10)


class Claim(BaseModel):
    """One entry of `published.toml`; without `value` there is no published number to compare with.

    Attributes:
        what: the setting.
        method: method and preset.
        fields: hyper-parameters over the preset's.
        shape: of the model.
        sites: roles or name ends of the adapted layers.
        tasks: number of tasks, by which ours is divided.
        value: the printed number.
        unit: what the printed number counts.
        decimals: digits it was printed with.
        share: the printed number is a percentage of all numbers, frozen and trainable.
        table: name of a published table whose rows must be explained together.
        source: where the number is printed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    method: str
    fields: dict[str, Any]
    shape: str
    sites: list[str] | None = None
    tasks: int
    value: float | None = None
    unit: float = 1.0
    decimals: int = 0
    share: bool = False
    table: str | None = None
    source: str

    @property
    def units(self) -> dict[str, float]:
        """Units a printed number may be in, by what a verdict adds."""
        return {"": self.unit, " in units of 2^20": 2.0**20} if self.unit == 1e6 else {"": self.unit}

    def prints(self, count: float, unit: float) -> bool:
        """Whether a count prints as the published one."""
        return self.value is not None and round(count / unit, self.decimals) == self.value

    @property
    def printed(self) -> str:
        """The published number."""
        if self.value is None:
            return ""
        return f"{self.value} %" if self.share else f"{self.value * self.unit:,.0f}"


class Counts(BaseModel):
    """Ours for one claim.

    Attributes:
        per_task: under each convention, divided by the number of tasks.
        one_more_task: how many numbers a further task adds.
        merged: what is left beside a merged model.
        share: percentage of all numbers, frozen and trainable.
    """

    per_task: dict[str, float]
    one_more_task: int
    merged: int
    share: float


def read_claims() -> list[Claim]:
    """All entries of `published.toml`."""
    return [Claim.model_validate(entry) for entry in tomllib.loads(PUBLISHED.read_text())["count"]]


@cache
def _model(shape: str) -> nn.Module:
    return build_shape(shape)


def measure(claim: Claim) -> Counts:
    """Our count of a claim's setting, from modules."""
    factory = moepeft.method(claim.method, num_tasks=claim.tasks, **claim.fields)
    attachment = moepeft.attach(_model(claim.shape), factory, sites=claim.sites, train=[])
    count, sites = attachment.parameter_count(), attachment.sites
    attachment.detach()
    if count.total != count.closed_form:
        raise AssertionError(f"{claim.method}: modules hold {count.total}, the closed form says {count.closed_form}")
    return Counts(
        per_task={name: number / claim.tasks for name, number in _conventions(count).items()},
        one_more_task=count_added_by_task(factory, sites),
        merged=0 if factory.capabilities.not_mergeable is None else count.total,
        share=100 * count.total / (count.base + count.total),
    )


def _conventions(count: ParameterCount) -> dict[str, int]:
    return dict(zip(CONVENTIONS, (count.total, count.total - count.task_tables, count.core), strict=True))


def verdict(claim: Claim, counts: Counts, unexplained: str = "no convention prints this number") -> str:
    """Which conventions print as published.

    Args:
        claim: the published number.
        counts: ours.
        unexplained: what to say if none does.
    """
    if claim.value is None:
        return "no published count"
    if claim.share:
        exact = round(counts.share, claim.decimals) == claim.value
        return "reproduced: share of frozen and trainable numbers" if exact else f"unexplained: {unexplained}"
    names = [
        f"{name}{suffix}"
        for suffix, unit in claim.units.items()
        for name, count in counts.per_task.items()
        if claim.prints(count, unit)
    ]
    return f"reproduced: {', '.join(names)}" if names else f"unexplained: {unexplained}"


# ---------------------------------------------------------------------- a search over settings


def search(claims: Sequence[Claim]) -> str:
    """Look for one setting that prints all rows of a published table of LLaMA-2-7B.

    A setting is a set of sites, a rank, a number of tasks and a unit. Each row may take a convention of its own, and
    the presets of one method are readings of one row.

    Returns:
        What was searched and found, for a verdict.
    """
    rows: dict[str, list[Claim]] = {}
    for claim in claims:
        rows.setdefault(claim.method.partition("@")[0], []).append(claim)
    settings = list(product(SITE_SETS, RANKS, TASKS, (1e6, 2.0**20)))
    found = []
    partial = dict.fromkeys(rows, 0)
    for sites, rank, tasks, unit in settings:
        explained = {
            name: any(
                claim.prints(count / tasks, unit)
                for claim in readings
                for count in _of_llama(claim.method, rank, tasks, sites).values()
            )
            for name, readings in rows.items()
        }
        for name, prints in explained.items():
            partial[name] += prints
        if all(explained.values()):
            found.append(f"{sites}, r = {rank}, {tasks} tasks")
    alone = ", ".join(f"{name} {number}" for name, number in partial.items())
    together = "; ".join(found) if found else "none"
    return (
        f"of {len(settings):,} settings ({len(SITE_SETS)} site sets, ranks {RANKS[0]} to {RANKS[-1]}, 1 to "
        f"{TASKS[-1]} tasks, 2 units) these print one row of this table: {alone}; all rows at once: {together}"
    )


def _of_llama(method: str, rank: int, tasks: int, sites: str) -> Mapping[str, int]:
    """Total over LLaMA-2-7B's 32 layers under each convention."""
    totals = dict.fromkeys(CONVENTIONS, 0)
    for role in sites.split():
        shape = {"gate": "4096x11008", "up": "4096x11008", "down": "11008x4096"}.get(role, "4096x4096")
        for name, number in _of_layer(method, rank, tasks, shape).items():
            totals[name] += 32 * number
    return totals


@cache
def _of_layer(method: str, rank: int, tasks: int, shape: str) -> Mapping[str, int]:
    attachment = moepeft.attach(_model(shape), moepeft.method(method, num_tasks=tasks, rank=rank))
    numbers = _conventions(attachment.parameter_count())
    attachment.detach()
    return numbers


# ---------------------------------------------------------------------- the table


def table(claims: Sequence[Claim]) -> str:
    """The table as Markdown."""
    tables: dict[str, list[Claim]] = {}
    for claim in claims:
        if claim.table is not None:
            tables.setdefault(claim.table, []).append(claim)
    searched = {name: search(rows) for name, rows in tables.items()}
    lines = []
    for claim in claims:
        counts = measure(claim)
        fields = ", ".join(f"{name}={value}" for name, value in claim.fields.items())
        numbers = [f"{count:,.0f}" for count in counts.per_task.values()]
        said = verdict(claim, counts, searched[claim.table]) if claim.table else verdict(claim, counts)
        after = [f"{counts.one_more_task:,}", f"{counts.merged:,}"]
        lines.append([claim.what, claim.method, fields, claim.printed, *numbers, *after, said, claim.source])
    own = ("added by one more task", "after merging")
    head = ["setting", "method", "fields", "published", *CONVENTIONS, *own, "verdict", "source"]
    text: str = tabulate(lines, head, tablefmt="github", disable_numparse=True)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder; writes tables/claims.md in it")
    target = parser.parse_args(arguments).results / "tables" / "claims.md"
    text = (
        "<!-- python -m benchmarks.claims -->\n\n"
        "Trainable numbers per task, on modules of the true shapes. A published count is reproduced when ours prints "
        "the same. Beside the per-task numbers of the papers, which fall with the number of tasks, stand what one more "
        "task adds and what is left beside a merged model, both in whole numbers.\n\n" + table(read_claims()) + "\n"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
