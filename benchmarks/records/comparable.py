"""Which records may stand in one table: those of equal protocol, by method, one per seed."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.protocols.protocol import Protocol
from benchmarks.records.identity import Baseline, comparable, own_rates
from benchmarks.records.schema import Cell, RunRecord, Tuning

BASELINES = tuple(Baseline)
"""Rows that adapt nothing; they open every table."""


@dataclass(frozen=True, slots=True)
class MethodRuns:
    """The runs of one method in one configuration under one protocol.

    Attributes:
        label: the method's name, with the differing fields where one name stands for several configurations.
        records: one per seed, by seed.
    """

    label: str
    records: tuple[RunRecord, ...]

    @property
    def method(self) -> str:
        """The method as written on the command line."""
        return self.records[0].cell.method

    @property
    def finished(self) -> tuple[RunRecord, ...]:
        """The runs that ended well."""
        return tuple(record for record in self.records if record.status == "ok")


@dataclass(frozen=True, slots=True)
class Group:
    """Everything that was run under one protocol.

    Attributes:
        label: the protocol's name, with the differing fields where several protocols have that name.
        key: hash of what all its cells share.
        shared: what all its cells share, by the name of the field.
        rows: baselines first, then the methods by name.
    """

    label: str
    key: str
    shared: Mapping[str, Any]
    rows: tuple[MethodRuns, ...]

    @property
    def protocol(self) -> Protocol:
        """The protocol of the first record. Where rates were tuned, its learning rates are that record's own."""
        return self.rows[0].records[0].cell.protocol

    @property
    def tuned(self) -> Tuning | None:
        """How the rates were found; None where all methods have one rate."""
        return self.rows[0].records[0].cell.tuned

    @property
    def records(self) -> tuple[RunRecord, ...]:
        """All records of the group."""
        return tuple(record for row in self.rows for record in row.records)


def group_records(records: Iterable[RunRecord]) -> list[Group]:
    """Split records into groups that may be compared, sorted by label."""
    by_content = _split(records, lambda record: comparable(record.cell))
    names = [runs[0].cell.protocol.name for runs in by_content.values()]
    contents = [comparable(runs[0].cell) for runs in by_content.values()]
    labels = _labels(names, contents)
    groups = [
        Group(label, key, content, _method_rows(runs))
        for label, content, (key, runs) in zip(labels, contents, by_content.items(), strict=True)
    ]
    return sorted(groups, key=lambda group: (group.label, group.key))


def _method_rows(records: Sequence[RunRecord]) -> tuple[MethodRuns, ...]:
    by_method = _split(records, lambda record: {"method": record.cell.method, "config": _settings(record.cell)})
    firsts = [runs[0].cell for runs in by_method.values()]
    labels = _labels([cell.method for cell in firsts], [_settings(cell) for cell in firsts])
    rows = [
        MethodRuns(label, tuple(sorted(runs, key=lambda record: record.cell.seed)))
        for label, runs in zip(labels, by_method.values(), strict=True)
    ]
    return tuple(sorted(rows, key=lambda row: (baseline_rank(row.method), row.label)))


def _settings(cell: Cell) -> dict[str, Any]:
    """What one method's runs share: its configuration, and its rates where they are its own."""
    return cell.config | own_rates(cell)


def find_row(group: Group, cell: Cell) -> MethodRuns | None:
    """The row of a group whose method and configuration are those of `cell`, at whatever rate."""
    same = (row for row in group.rows if (row.method, row.records[0].cell.config) == (cell.method, cell.config))
    return next(same, None)


def baseline_rank(method: str) -> int:
    """Position of a baseline among the baselines; all other methods come after them."""
    return BASELINES.index(Baseline(method)) if method in BASELINES else len(BASELINES)


def _split(records: Iterable[RunRecord], content: Callable[[RunRecord], Any]) -> dict[str, list[RunRecord]]:
    parts: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        text = json.dumps(content(record), sort_keys=True)
        parts[hashlib.sha256(text.encode()).hexdigest()[:16]].append(record)
    return dict(sorted(parts.items()))


def _labels(names: Sequence[str], contents: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names; those that occur twice with the fields in which their contents differ."""
    labels = []
    for name, content in zip(names, contents, strict=True):
        same = [_flat(other) for other_name, other in zip(names, contents, strict=True) if other_name == name]
        fields = sorted({field for other in same for field in other})
        varying = [field for field in fields if len({repr(other.get(field)) for other in same}) > 1]
        own = _flat(content)
        shown = ", ".join(f"{field}={_short(own.get(field))}" for field in varying)
        labels.append(f"{name} ({shown})" if shown else name)
    return labels


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
