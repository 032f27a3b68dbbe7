"""Speed and growth as tables to read, and as JSON with every figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd
from pydantic import TypeAdapter

from benchmarks.records.schema import Provenance
from benchmarks.reporting.footnotes import hardware
from benchmarks.reporting.render import Table, to_markdown
from benchmarks.speed.growth import Growth
from benchmarks.speed.rows import Group, Row

NOTHING = ""
_MEBI = 2**20
_WHAT = {"train": "training step", "prefill": "prefill", "decode": "decode, one token"}


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
        "saved_bytes": None if costs is None else costs.saved_bytes,
        "peak_bytes": None if costs is None else costs.peak_bytes,
        "mfu": row.mfu,
        "parameters": row.parameters,
    }


def document(heading: str, tables: Sequence[Table], notes: Sequence[str], provenance: Provenance) -> str:
    """The file: its command first, then the tables, then what one has to know."""
    code = "version unknown" if provenance.commit is None else f"commit {provenance.commit[:10]}"
    changed = " with uncommitted changes" if provenance.dirty else ""
    head = f"<!-- Made by `{provenance.command}`: edit nothing here, run it again. -->\n\n## {heading}\n"
    lines = [*notes, f"{hardware(provenance)} Code: {code}{changed}.", f"Made by `{provenance.command}`."]
    return "\n".join([head, *(to_markdown(table) for table in tables), "".join(f"- {line}\n" for line in lines)])


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
