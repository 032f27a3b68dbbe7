"""Equal tuning: every method tries rates by one rule (`benchmarks.protocols.halving`) and is reported at its best.

Trials are ordinary cells: scored on rows cut from the training rows, with seeds that are never reported, stored in
a folder of their own and never run twice. Which trials there are depends on how earlier ones ended: they are planned
again after each round. The reported cells carry the rate in their protocol, and how it was found.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from benchmarks.methods.base import Method
from benchmarks.plan.cells import PlannedCell, expand
from benchmarks.protocols.halving import Halving, choose, floored
from benchmarks.protocols.protocol import Suite
from benchmarks.records.schema import Tuning
from benchmarks.records.store import Store
from benchmarks.records.trials import endpoint_score
from benchmarks.tasks.base import TaskData


@dataclass(frozen=True, slots=True)
class Tuned:
    """The state of the tuning.

    Attributes:
        trials: all that are asked for so far, whether they were made or not.
        rates: the best rate by method, of those whose trials are all there.
        waiting: methods whose trials are not.
    """

    trials: tuple[PlannedCell, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    waiting: frozenset[str] = frozenset()


class _Waiting(Exception):
    """Trials are not there yet."""


def tune(suite: Suite, methods: Collection[Method], data: Sequence[TaskData], store: Store) -> Tuned:
    """Which trials are needed by what is known now, and the rates that are decided; nothing where nothing is tuned."""
    trials: list[PlannedCell] = []
    rates, waiting = {}, set()
    for method in methods if suite.tuning_rates else ():
        if not method.trains_under(suite.protocol):
            continue
        try:
            rates[method.name] = _choose(suite, method, data, store, trials)
        except _Waiting:
            waiting.add(method.name)
    return Tuned(tuple(trials), rates, frozenset(waiting))


def _choose(suite: Suite, method: Method, data: Sequence[TaskData], store: Store, trials: list[PlannedCell]) -> float:
    """The best rate of a method; notes in `trials` what was asked for on the way."""

    def scores(tried: Sequence[float], steps: int) -> dict[float, float]:
        protocol = suite.protocol.for_trial(steps)
        cells = {
            rate: expand(method.at_rate(protocol, rate), (method,), data, suite.tuning_seeds, trial=True)
            for rate in tried
        }
        trials.extend(planned for some in cells.values() for planned in some)
        means = {}
        for rate, some in cells.items():
            records = [store.find(planned.cell) for planned in some]
            if any(record is None or record.status == "interrupted" for record in records):
                raise _Waiting
            means[rate] = fmean(
                floored(endpoint_score(record) if record is not None and record.status == "ok" else None)
                for record in records
            )
        return means

    halving = Halving(
        rates=suite.tuning_rates,
        seeds=suite.tuning_seeds,
        first_steps=suite.tuning_first_steps,
        extensions=suite.tuning_extensions,
    )
    return choose(method.name, halving, suite.tuning_steps or suite.steps, scores).rate


def tuned_cells(
    suite: Suite, methods: Collection[Method], data: Sequence[TaskData], rates: Mapping[str, float]
) -> list[PlannedCell]:
    """The reported cells, seed by seed, every method at its own rate of `rates`."""
    protocol = suite.protocol
    cells = [
        planned
        for method in methods
        for planned in expand(
            method.at_rate(protocol, rates[method.name]) if method.name in rates else protocol,
            (method,),
            data,
            suite.seeds,
            tuned=how_tuned(suite),
        )
    ]
    return sorted(cells, key=lambda planned: suite.seeds.index(planned.cell.seed))


def how_tuned(suite: Suite) -> Tuning:
    """What of the tuning belongs to the identity of a reported cell."""
    return Tuning(
        rates=tuple(sorted(suite.tuning_rates)),
        seed=suite.tuning_seeds[0],
        more_seeds=suite.tuning_seeds[1:],
        steps=suite.tuning_steps or suite.steps,
        first_steps=suite.tuning_first_steps,
        extensions=suite.tuning_extensions,
        head_learning_rate=suite.head_learning_rate,
    )
