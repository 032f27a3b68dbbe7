"""How the time of a training step grows with experts, rank, sequence length and tasks, on one layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import nn

from benchmarks.instruments.clock import Step, Timings, interleave
from benchmarks.speed.contestants import (
    FROZEN,
    REFERENCE_RANK,
    Contestant,
    Entry,
    adapted,
    build_all,
    frozen,
    reference,
)
from benchmarks.speed.hosts import FeedForward
from benchmarks.speed.options import Axis
from benchmarks.speed.rows import Row, Schedule, failed_row, make_steps, row
from benchmarks.speed.workloads import Workload
from moepeft.config import sizes, task_number, with_experts, with_tasks
from moepeft.errors import ConfigError, Unsupported
from moepeft.protocols import AdapterFactory

VALUES: Mapping[Axis, tuple[int, ...]] = {
    "experts": (4, 8, 16, 64),
    "rank": (4, 8, 16, 64),
    "length": (32, 64, 128, 256, 512),
    "tasks": (8, 64, 512),
}
REFERENCE = "peft"


class NotOnAxis(Unsupported):
    """The method has no such quantity, or not that much of it."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Rows by method and value along one axis; a failed row, or one of a method that knows no such quantity, says so.

    Attributes:
        axis: what grows.
        rows: method -> value -> row.
        exponents: method -> fitted exponent; None with fewer than two times.
    """

    axis: Axis
    rows: dict[str, dict[int, Row]]
    exponents: dict[str, float | None]


def fit_exponent(values: Sequence[float], seconds: Sequence[float]) -> float | None:
    """The b of time = a value^b by least squares on logarithms; None for fewer than two different values."""
    if len(set(values)) < 2:
        return None
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def scaled(factory: AdapterFactory, axis: Axis, value: int) -> AdapterFactory:
    """The configuration with `value` experts, ranks or tasks; unchanged for the length of the input.

    Raises:
        NotOnAxis: it has no field for that, or refuses the value.
    """
    try:
        if axis == "experts":
            return with_experts(factory, value)
        if axis == "rank" and "rank" in sizes(factory):
            changed: AdapterFactory = dataclasses.replace(factory, rank=value)  # type: ignore[type-var]
            return changed
        if axis == "tasks" and task_number(factory) is not None:
            return with_tasks(factory, value)
    except (ConfigError, Unsupported) as error:
        raise NotOnAxis(str(error)) from error
    if axis == "length":
        return factory
    raise NotOnAxis(f"{factory.name} has no number of {axis} to change")


def workload_at(workload: Workload, axis: Axis, value: int) -> Workload:
    """The work at a value: longer rows; or as many rows as the most tasks need, with as many tokens in all."""
    if axis == "length":
        return replace(workload, length=value)
    if axis == "tasks":
        rows = max(VALUES["tasks"])
        return replace(workload, rows=rows, tasks=value, length=max(1, workload.rows * workload.length // rows))
    return workload


@dataclass(frozen=True, slots=True)
class _Point:
    """One method at one value of an axis; without an entry it is the bare layer or the reference."""

    name: str
    entry: Entry | None
    axis: Axis
    value: int

    @property
    def label(self) -> str:
        return f"{self.name} at {self.value}"

    @property
    def unit(self) -> str:
        """Label of the reference at the same value."""
        return f"{REFERENCE} at {self.value}"


def measure_growth(
    axis: Axis,
    host: nn.Module,
    entries: Mapping[str, Entry],
    workload: Workload,
    schedule: Schedule,
    *,
    compiled: bool,
) -> Growth:
    """Time all methods at all values in turns, the bare layer and the reference beside them.

    Args:
        axis: what grows.
        host: one frozen layer. A method that adapts whole feed-forward networks gets one of the layer's input width.
        entries: the methods by the names of their rows.
        workload: a training step, at the value that the axis does not change.
        schedule: how often.
        compiled: whether to compile what is called.
    """
    weight = next(host.parameters())
    network = FeedForward(weight.shape[1]).to(weight.device, weight.dtype)
    everyone: dict[str, Entry | None] = {FROZEN: None, REFERENCE: None, **entries}
    points = [_Point(name, entry, axis, value) for name, entry in everyone.items() for value in VALUES[axis]]
    built, failures = build_all({point.label: partial(_build, point, host, network, compiled) for point in points})
    contestants = {contestant.label: contestant for contestant in built}
    steps: list[Step] = []
    for value in VALUES[axis]:
        present = [contestants[point.label] for point in points if point.value == value and point.label in contestants]
        made, failed = make_steps(present, host, workload_at(workload, axis, value))
        steps += made.values()
        failures.update(failed)
    timings = interleave(steps, warmup=schedule.warmup, repeats=schedule.repeats, device=weight.device)
    timings.failures.update(failures)
    rows: dict[str, dict[int, Row]] = {name: {} for name in everyone}
    for point in points:
        rows[point.name][point.value] = _point_row(point, contestants.get(point.label), timings)
    return Growth(axis, rows, {name: _exponent(by_value) for name, by_value in rows.items()})


def _build(point: _Point, host: nn.Module, network: nn.Module, compiled: bool) -> Contestant:
    if point.name == FROZEN:
        made = frozen(host, compiled=compiled, backward=True)
    elif point.entry is None:
        rank = point.value if point.axis == "rank" else REFERENCE_RANK
        made = reference(host, None, compiled=compiled, rank=rank)
    else:
        entry = replace(point.entry, factory=scaled(point.entry.factory, point.axis, point.value))
        try:
            made = adapted(point.label, host, entry, None, compiled=compiled)
        except Unsupported:  # the method adapts nothing less than a network
            made = adapted(point.label, network, entry, None, compiled=compiled)
    made.model.train()
    return replace(made, label=point.label)


def _point_row(point: _Point, contestant: Contestant | None, timings: Timings) -> Row:
    if contestant is None:
        return failed_row(point.label, timings.failures[point.label])
    return row(contestant, timings, point.unit)


def _exponent(rows: Mapping[int, Row]) -> float | None:
    timed = {value: one.quantiles.median for value, one in rows.items() if one.quantiles is not None}
    return fit_exponent(list(timed), list(timed.values()))
