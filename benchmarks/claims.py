"""Published parameter counts beside ours, under every convention: ``python -m benchmarks.claims``.

Papers divide by the number of tasks and differ in what they leave out. Each published count (`published.toml`, with
its source) is compared with ours under four named conventions, on modules of the true shapes on the meta device. A
verdict says which convention reproduces it to the printed digit, or that none does.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from tabulate import tabulate
from torch import nn

import moepeft
from benchmarks.backbones.shapes import build_shape
from moepeft.counting import ParameterCount

PUBLISHED = Path(__file__).with_name("published.toml")
CONVENTIONS = ("all trainable", "without task tables", "adapter core only", "at inference")


class Claim(BaseModel):
    """One entry of `published.toml`; without `value` there is no published number to compare with."""

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
    source: str

    def reproduced_by(self, count: float) -> bool:
        """Whether a count prints as the published one."""
        return self.value is not None and round(count / self.unit, self.decimals) == self.value


def read_claims() -> list[Claim]:
    """All entries of `published.toml`."""
    return [Claim.model_validate(entry) for entry in tomllib.loads(PUBLISHED.read_text())["count"]]


@cache
def _model(shape: str) -> nn.Module:
    return build_shape(shape)


def measure(claim: Claim) -> dict[str, float]:
    """Our count under each convention, per task.

    At inference a mergeable method needs no number of its own; of the others the task tables can go.
    """
    factory = moepeft.method(claim.method, num_tasks=claim.tasks, **claim.fields)
    attachment = moepeft.attach(_model(claim.shape), factory, sites=claim.sites)
    count = attachment.parameter_count()
    attachment.detach()
    if count.total != count.closed_form:
        raise AssertionError(f"{claim.method}: modules hold {count.total}, the closed form says {count.closed_form}")
    per_task = _conventions(count, mergeable=factory.capabilities.not_mergeable is None)
    return {name: number / claim.tasks for name, number in per_task.items()}


def _conventions(count: ParameterCount, *, mergeable: bool) -> dict[str, int]:
    untabled = count.total - count.task_tables
    numbers = (count.total, untabled, count.core, 0 if mergeable else untabled)
    return dict(zip(CONVENTIONS, numbers, strict=True))


def verdict(claim: Claim, counts: dict[str, float]) -> str:
    """Which conventions print as published."""
    if claim.value is None:
        return "no published count"
    names = [name for name, count in counts.items() if claim.reproduced_by(count)]
    return f"reproduced: {', '.join(names)}" if names else "not reproduced under any convention"


def table(claims: Sequence[Claim]) -> str:
    """The table as Markdown."""
    rows = []
    for claim in claims:
        counts = measure(claim)
        shown = "" if claim.value is None else f"{claim.value * claim.unit:,.0f}"
        fields = ", ".join(f"{name}={value}" for name, value in claim.fields.items())
        numbers = [f"{count:,.0f}" for count in counts.values()]
        rows.append([claim.what, claim.method, fields, shown, *numbers, verdict(claim, counts), claim.source])
    head = ["setting", "method", "fields", "published", *CONVENTIONS, "verdict", "source"]
    text: str = tabulate(rows, head, tablefmt="github", disable_numparse=True)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder; writes tables/claims.md in it")
    target = parser.parse_args(arguments).results / "tables" / "claims.md"
    text = (
        "<!-- python -m benchmarks.claims -->\n\n"
        "Trainable numbers per task, on modules of the true shapes; a published count is reproduced when ours prints "
        "the same.\n\n" + table(read_claims()) + "\n"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
