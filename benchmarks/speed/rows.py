"""From contestants and a workload to rows: times, ratios, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from benchmarks.instruments.clock import (
    Ratio,
    Step,
    Timings,
    collecting_between_rounds,
    interleave,
    paired_ratio,
    quantiles,
)
from benchmarks.records.failures import one_line, status_of
from benchmarks.records.schema import Quantiles
from benchmarks.speed.contestants import FORWARD_ONLY, FROZEN, Contestant, Failures, attempt
from benchmarks.speed.costs import Costs, measure_costs
from benchmarks.speed.hosts import kind_of
from benchmarks.speed.workloads import Workload, make_step
from moepeft.errors import NotMergeable


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often: rounds that do not count, and rounds that do."""

    warmup: int
    repeats: int


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant under one workload. Without `quantiles` it failed, and `status` and `reason` say how.

    Attributes:
        label: the contestant.
        parameters: numbers that train.
        status: ``ok``, or how it ended (`benchmarks.records.schema.Status`).
        reason: why, in one line.
        seconds: of every timed round.
        quantiles: of `seconds`.
        ratio: to the reference; None where there is none in the same rounds.
        tokens_per_second: at the median, padding left out (there is none).
        costs: operations and memory.
        operations_per_site: tensor operations above the frozen model's, for each adapted layer.
        mfu: share of the peak: the frozen model's operations per second over the device's.
    """

    label: str
    parameters: int
    status: str = "ok"
    reason: str | None = None
    seconds: tuple[float, ...] = ()
    quantiles: Quantiles | None = None
    ratio: Ratio | None = None
    tokens_per_second: float | None = None
    costs: Costs | None = None
    operations_per_site: float | None = None
    mfu: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """All contestants under one workload."""

    workload: Workload
    rows: tuple[Row, ...]


def measure_group(
    contestants: Sequence[Contestant],
    host: nn.Module,
    workload: Workload,
    schedule: Schedule,
    *,
    reference: str,
    peak_tflops: float | None = None,
) -> Group:
    """Time the contestants in turns, then count what one step of each costs.

    Args:
        contestants: in the order of the rows.
        host: the bare model they were made of.
        workload: what they do.
        schedule: how often.
        reference: label of the contestant whose time is the unit.
        peak_tflops: the device's peak, for the share of it that is used.
    """
    device = next(host.parameters()).device
    for contestant in contestants:
        contestant.model.train(workload.trains)
    steps, failures = make_steps(contestants, host, workload)
    counts = {"warmup": schedule.warmup, "repeats": schedule.repeats, "settle": workload.settle}
    timings = interleave(list(steps.values()), device=device, **counts)
    timings.failures.update(failures)
    with collecting_between_rounds():
        costs, uncounted = _all_costs(contestants, steps, timings, host, workload)
    timings.failures.update(uncounted)
    work = _Work(workload.tokens(kind_of(host)), _frozen(costs), peak_tflops)
    rows = [row(contestant, timings, reference, costs.get(contestant.label), work) for contestant in contestants]
    return Group(workload, tuple(rows))


def _all_costs(
    contestants: Sequence[Contestant], steps: Mapping[str, Step], timings: Timings, host: nn.Module, workload: Workload
) -> tuple[dict[str, Costs], Failures]:
    """What a step of everyone who was timed costs, and the errors of those where it could not be counted."""
    device = next(host.parameters()).device
    costs, failures = {}, {}
    for contestant in contestants:
        label = contestant.label
        if label not in timings.seconds:
            continue
        eager = make_step(contestant.eager, host, workload, counted=True)
        counted = attempt(partial(measure_costs, contestant, steps[label], eager, device))
        if isinstance(counted, Exception):
            failures[label] = counted
        else:
            costs[label] = counted
    return costs, failures


def make_steps(
    contestants: Sequence[Contestant], host: nn.Module, workload: Workload
) -> tuple[dict[str, Step], Failures]:
    """The steps by label, and the errors of those that cannot start (decoding fills its cache first)."""
    steps, failures = {}, {}
    for contestant in contestants:
        made = attempt(partial(make_step, contestant, host, workload))
        if isinstance(made, Exception):
            failures[contestant.label] = made
        else:
            steps[contestant.label] = made
    return steps, failures


@dataclass(frozen=True, slots=True)
class _Work:
    """What a step's time is divided into."""

    tokens: int
    frozen: Costs | None
    peak_tflops: float | None

    def mfu(self, seconds: float) -> float | None:
        """Share of the peak; of the frozen model's operations, so that adapters' own do not count as use."""
        if self.frozen is None or self.peak_tflops is None:
            return None
        return self.frozen.flops / seconds / (self.peak_tflops * 1e12)

    def operations_per_site(self, costs: Costs | None, sites: int) -> float | None:
        """Tensor operations above the frozen model's, for each adapted layer."""
        if self.frozen is None or costs is None or not sites:
            return None
        return (costs.kernels - self.frozen.kernels) / sites


def _frozen(costs: Mapping[str, Costs]) -> Costs | None:
    """What the frozen model costs: the work that all contestants share."""
    for label in (FROZEN, FORWARD_ONLY):
        if label in costs:
            return costs[label]
    return None


def row(
    contestant: Contestant, timings: Timings, reference: str, costs: Costs | None = None, work: _Work | None = None
) -> Row:
    """What the clock and the counters say of one contestant."""
    label, parameters = contestant.label, sum(parameter.numel() for parameter in contestant.parameters)
    if label in timings.failures:
        return failed_row(label, timings.failures[label], parameters)
    seconds = timings.seconds[label]
    spread = quantiles(seconds)
    known = reference in timings.seconds
    return Row(
        label=label,
        parameters=parameters,
        seconds=tuple(seconds),
        quantiles=spread,
        ratio=paired_ratio(seconds, timings.seconds[reference]) if known else None,
        tokens_per_second=None if work is None else work.tokens / spread.median,
        costs=costs,
        operations_per_site=None if work is None else work.operations_per_site(costs, contestant.sites),
        mfu=None if work is None else work.mfu(spread.median),
    )


def failed_row(label: str, error: Exception, parameters: int = 0) -> Row:
    """A row that says how and why there are no figures."""
    status = "unsupported" if isinstance(error, NotMergeable) else status_of(error)
    return Row(label, parameters, status=status, reason=one_line(error))
