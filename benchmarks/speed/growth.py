"""How the time of a training step grows with experts, rank, sequence length and tasks, on one layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from benchmarks.instruments.clock import Step, interleave
from benchmarks.speed.contestants import FROZEN, REFERENCE_RANK, Contestant, adapted, frozen, reference
from benchmarks.speed.hosts import FeedForward
from benchmarks.speed.rows import Row, Schedule, build_all, failed_row, make_steps, row
from benchmarks.speed.workloads import Workload
from moepeft.errors import ConfigError, Unsupported
from moepeft.protocols import AdapterFactory

Axis = Literal["experts", "rank", "length", "tasks"]
AXES: tuple[Axis, ...] = get_args(Axis)
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
    if axis == "length":
        return factory
    fields = {field.name for field in dataclasses.fields(factory)}  # type: ignore[arg-type]
    if axis == "experts" and not fields & {"num_experts", "experts"} and "kernels" in fields:
        # One expert per kernel: the distinct sizes in turn, so that every number of experts has all scales.
        sizes = dict.fromkeys(getattr(factory, "kernels"))  # noqa: B009 - no attribute of the protocol
        return _replaced(factory, kernels=tuple(islice(cycle(sizes), value)))
    names = {"experts": ("num_experts", "experts"), "rank": ("rank",), "tasks": ("num_tasks",)}[axis]
    for name in names:
        if name in fields:
            return _replaced(factory, **{name: value})
    raise NotOnAxis(f"{factory.name} has no hyper-parameter {' or '.join(names)}")


def _replaced(factory: AdapterFactory, **values: Any) -> AdapterFactory:
    try:
        changed: AdapterFactory = dataclasses.replace(factory, **values)  # type: ignore[type-var]
    except ConfigError as error:
        raise NotOnAxis(str(error)) from error
    return changed


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
    """One method at one value."""

    name: str
    value: int

    @property
    def label(self) -> str:
        return f"{self.name} at {self.value}"


def measure_growth(
    axis: Axis,
    host: nn.Module,
    factories: Mapping[str, AdapterFactory],
    workload: Workload,
    schedule: Schedule,
    *,
    compiled: bool,
) -> Growth:
    """Time all methods at all values in turns, the bare layer and the reference beside them.

    Args:
        axis: what grows.
        host: one frozen layer. A method that adapts whole feed-forward networks gets one of the layer's input width.
        factories: configurations by the names of their rows.
        workload: a training step, at the value that the axis does not change.
        schedule: how often.
        compiled: whether to compile what is called.
    """
    weight = next(host.parameters())
    network = FeedForward(weight.shape[1]).to(weight.device, weight.dtype)
    points = [_Point(name, value) for name in (FROZEN, REFERENCE, *factories) for value in VALUES[axis]]
    builders = {
        point.label: partial(_build, point, axis, host, network, factories.get(point.name), compiled=compiled)
        for point in points
    }
    contestants, failures = build_all(builders)
    steps: dict[str, Step] = {}
    for value in VALUES[axis]:
        labels = {point.label for point in points if point.value == value}
        there = [contestant for contestant in contestants if contestant.label in labels]
        made, failed = make_steps(there, host, workload_at(workload, axis, value))
        steps.update(made)
        failures.update(failed)
    timings = interleave(list(steps.values()), warmup=schedule.warmup, repeats=schedule.repeats, device=weight.device)
    timings.failures.update(failures)
    by_label = {contestant.label: contestant for contestant in contestants}
    rows: dict[str, dict[int, Row]] = {}
    for point in points:
        found = by_label.get(point.label)
        unit = _Point(REFERENCE, point.value).label
        rows.setdefault(point.name, {})[point.value] = (
            row(found, timings, unit) if found else failed_row(point.label, timings.failures[point.label])
        )
    return Growth(axis, rows, {name: _exponent(by_value) for name, by_value in rows.items()})


def _build(
    point: _Point, axis: Axis, host: nn.Module, network: nn.Module, factory: AdapterFactory | None, *, compiled: bool
) -> Contestant:
    if point.name == FROZEN:
        made = frozen(host, compiled=compiled, backward=True)
    elif factory is None:
        rank = point.value if axis == "rank" else REFERENCE_RANK
        made = reference(host, None, compiled=compiled, rank=rank)
    else:
        made = _adapted_somewhere(point.label, scaled(factory, axis, point.value), host, network, compiled)
    made.model.train()
    return replace(made, label=point.label)


def _adapted_somewhere(
    label: str, factory: AdapterFactory, host: nn.Module, network: nn.Module, compiled: bool
) -> Contestant:
    """On the single layer, or on the network if the method adapts nothing less."""
    try:
        return adapted(label, host, factory, None, compiled=compiled)
    except Unsupported:
        return adapted(label, network, factory, None, compiled=compiled)


def _exponent(rows: Mapping[int, Row]) -> float | None:
    timed = {value: found.quantiles.median for value, found in rows.items() if found.quantiles is not None}
    return fit_exponent(list(timed), list(timed.values()))
