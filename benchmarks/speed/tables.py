"""Speed and growth as tables to read, and as JSON with every figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from pydantic import TypeAdapter
from torch import nn

from benchmarks.instruments.memory import held, memory_kind
from benchmarks.records.schema import Provenance
from benchmarks.reporting.footnotes import hardware
from benchmarks.reporting.render import SPEED_OF, Table, to_markdown
from benchmarks.speed.growth import Growth
from benchmarks.speed.options import Options
from benchmarks.speed.rows import Group, Row

NOTHING = ""
_MEBI = 2**20
NOTES = (
    "ms: median over the timed rounds. x: median of the ratios to the reference in the same round (95 % bootstrap).",
    "A training step is forward, loss with auxiliary losses and backward. Random weights, no dropout, no padding.",
    "On a processor the memory that a step frees stays in the process while steps are timed: no page faults.",
    "The rows belong to {tasks} tasks, sorted by task as in training; a merged model serves task 0 alone.",
    "frozen: the bare model, its gradient taken to the first layer's input; frozen, forward only: without gradients.",
    "peak MiB: {peak}, above what was there before the step; the frozen weights' {weights:,.0f} MiB come on top.",
    "saved MiB: kept for backward, weights left out.",
    "GFLOP: counted, of matrix products. MFU: the frozen model's operations over time and the device's peak.",
    "kernels: tensor operations counted, views left out: what small steps take time for whatever their size.",
    "operations per site: the kernels above those of the frozen model, for each adapted layer.",
)
SETTLED = (
    "{work.mode}: untimed steps of the contestant before each timed one, so that caches are its own: {work.settle}."
)
GROWTH_NOTES = (
    "Median time of forward, loss and backward. exponent: b of time = a value^b, by least squares on logarithms.",
    "{rows} x {length} tokens of {tasks} tasks where the axis does not say otherwise.",
    "Over tasks: as many tokens in all, in as many rows as the most tasks need.",
    "A method that adapts whole feed-forward networks has one of two layers of the input's width.",
    "The bare layer and the reference know neither experts nor tasks: there, their exponent shows the noise.",
)
_WHAT = {
    "host": "training step, all dispatch",
    "train": "training step",
    "prefill": "prefill",
    "decode": "decode, one token",
}


def group_table(group: Group, reference: str) -> Table:
    """One table of a workload: a row per contestant, columns nobody has a figure for left out."""
    work = group.workload
    text = pd.DataFrame([_cells(row, reference) for row in group.rows]).fillna(NOTHING)
    empty = [name for name in text.columns if not any(text[name] != NOTHING)]
    title = f"{_WHAT[work.mode].capitalize()}: {work.rows} x {work.length} tokens"
    if work.mode == "decode":
        title = f"{_WHAT[work.mode].capitalize()}: {work.rows} rows, {work.length} tokens in the cache"
    data = pd.DataFrame([flat(row) for row in group.rows])
    return Table(f"speed-{work.mode}-{work.rows}", title, text.drop(columns=empty), data, _failures(group.rows))


def _cells(row: Row, reference: str) -> dict[str, str]:
    cells = {"contestant": row.label, "ms": row.status, "p10 to p90": NOTHING}
    if row.quantiles is None:
        return cells
    cells["ms"] = milliseconds(row.quantiles.median)
    cells["p10 to p90"] = f"{milliseconds(row.quantiles.p10)} to {milliseconds(row.quantiles.p90)}"
    if row.ratio is not None:
        interval = f" ({row.ratio.low:.2f} to {row.ratio.high:.2f})" if row.label != reference else NOTHING
        cells[f"x {reference}"] = f"{row.ratio.estimate:.2f}{interval}"
    if row.tokens_per_second is not None:
        cells["tokens/s"] = f"{row.tokens_per_second:,.0f}"
    if row.costs is not None:
        cells["peak MiB"] = f"{row.costs.peak_bytes / _MEBI:,.1f}"
        cells["saved MiB"] = f"{row.costs.saved_bytes / _MEBI:,.1f}" if row.costs.saved_bytes else NOTHING
        cells["GFLOP"] = three_digits(row.costs.flops / 1e9)
        cells["kernels"] = f"{row.costs.kernels:,}"
    if row.operations_per_site is not None:
        cells["operations per site"] = f"{row.operations_per_site:.1f}"
    if row.mfu is not None:
        cells["MFU"] = f"{row.mfu:.1%}"
    cells["trainable"] = f"{row.parameters:,}"
    return cells


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, to three digits."""
    return three_digits(1e3 * seconds)


def three_digits(value: float) -> str:
    """Three significant digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def growth_table(growth: Growth, title: str) -> Table:
    """A row per method, a column per value, and the exponent."""
    lines = []
    for name, rows in growth.rows.items():
        cells = {"contestant": name}
        for value, row in rows.items():
            time = "n/a" if row.quantiles is None else milliseconds(row.quantiles.median)
            cells[f"{growth.axis} {value}"] = time
        exponent = growth.exponents[name]
        cells["exponent"] = "n/a" if exponent is None else f"{exponent:.2f}"
        lines.append(cells)
    every = [row for rows in growth.rows.values() for row in rows.values()]
    data = pd.DataFrame([flat(row) for row in every])
    # Once per method, where it has no such quantity at any value.
    notes = dict.fromkeys(
        f"{name}: {row.status}: {row.reason}"
        for name, rows in growth.rows.items()
        for row in rows.values()
        if row.reason is not None
    )
    return Table(f"growth-{growth.axis}", title, pd.DataFrame(lines), data, tuple(notes))


def _failures(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(f"{row.label}: {row.status}: {row.reason}" for row in rows if row.reason is not None)


def flat(row: Row) -> dict[str, Any]:
    """A row's unrounded figures under plain names."""
    spread, ratio, costs = row.quantiles, row.ratio, row.costs
    return {
        "contestant": row.label,
        "status": row.status,
        "median_seconds": None if spread is None else spread.median,
        "p10_seconds": None if spread is None else spread.p10,
        "p90_seconds": None if spread is None else spread.p90,
        "ratio": None if ratio is None else ratio.estimate,
        "ratio_low": None if ratio is None else ratio.low,
        "ratio_high": None if ratio is None else ratio.high,
        "tokens_per_second": row.tokens_per_second,
        "flops": None if costs is None else costs.flops,
        "kernels": None if costs is None else costs.kernels,
        "operations_per_site": row.operations_per_site,
        "saved_bytes": None if costs is None else costs.saved_bytes,
        "peak_bytes": None if costs is None else costs.peak_bytes,
        "mfu": row.mfu,
        "parameters": row.parameters,
    }


@dataclass(frozen=True)
class Outcome:
    """What is shown and kept."""

    heading: str
    tables: list[Table]
    notes: tuple[str, ...]
    rows: list[Row]
    figures: dict[str, Any]


def compare(
    groups: Sequence[Group], unbuilt: Sequence[Row], host: nn.Module, options: Options, reference: str
) -> Outcome:
    """Tables of all workloads; `unbuilt` are the methods that could not be attached."""
    device = next(host.parameters()).device
    weights = held(host.parameters(), torch.device("cpu")) / _MEBI
    notes = [note.format(tasks=options.tasks, peak=memory_kind(device), weights=weights) for note in NOTES]
    settled = dict.fromkeys(SETTLED.format(work=group.workload) for group in groups if group.workload.settle)
    return Outcome(
        f"{SPEED_OF}{options.described}",
        [group_table(group, reference) for group in groups],
        (*notes, *settled, *_failures(unbuilt)),
        [*unbuilt, *(row for group in groups for row in group.rows)],
        {"groups": groups, "not_built": unbuilt},
    )


def compare_growth(growths: Sequence[Growth], options: Options) -> Outcome:
    """Tables of all axes."""
    return Outcome(
        f"Growth of the time on {options.described}",
        [growth_table(growth, f"Training step in ms over {growth.axis}") for growth in growths],
        tuple(note.format(rows=options.rows, length=options.length, tasks=options.tasks) for note in GROWTH_NOTES),
        [row for growth in growths for by_value in growth.rows.values() for row in by_value.values()],
        {"growth": {growth.axis: growth for growth in growths}},
    )


def document(outcome: Outcome, provenance: Provenance) -> str:
    """The file: its command first, then the tables, then what one has to know."""
    code = "version unknown" if provenance.commit is None else f"commit {provenance.commit[:10]}"
    changed = " with uncommitted changes" if provenance.dirty else ""
    head = f"<!-- Made by `{provenance.command}`: edit nothing here, run it again. -->\n\n## {outcome.heading}\n"
    lines = [*outcome.notes, f"{hardware(provenance)} Code: {code}{changed}.", f"Made by `{provenance.command}`."]
    return "\n".join(
        [head, *(to_markdown(table) for table in outcome.tables), "".join(f"- {line}\n" for line in lines)]
    )


def as_json(value: Any) -> Any:
    """Dataclasses and pydantic models, nested, as JSON knows them."""
    return TypeAdapter(Any).dump_python(_plain(value), mode="json")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
