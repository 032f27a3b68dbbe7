"""Equal tuning: every method tries the same learning rates, the same number of times, and is reported at its best one.

Trials are ordinary cells: scored on rows cut from the training rows, with a seed that is never reported, stored in
a folder of their own and never run twice. The reported cells carry the rate in their protocol, and how it was found.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from benchmarks.methods.base import Method
from benchmarks.plan.cells import PlannedCell, expand
from benchmarks.protocols.protocol import Suite
from benchmarks.records.schema import RunRecord, Tuning
from benchmarks.records.store import Store
from benchmarks.records.trials import read_trials
from benchmarks.tasks.base import TaskData


def trial_cells(suite: Suite, methods: Collection[Method], data: Sequence[TaskData]) -> list[PlannedCell]:
    """Every trial, method by method: each that trains, at each rate."""
    trial = suite.protocol.with_overrides(evaluate_on="fold", steps=suite.tuning_steps)
    return [
        planned
        for method in methods
        if method.trains_under(trial)
        for rate in sorted(suite.tuning_rates)
        for planned in expand(method.at_rate(trial, rate), (method,), data, (suite.tuning_seed,), trial=True)
    ]


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
        seed=suite.tuning_seed,
        steps=suite.tuning_steps or suite.steps,
        head_learning_rate=suite.head_learning_rate,
    )


def chosen_rates(cells: Iterable[PlannedCell], store: Store) -> dict[str, float]:
    """The best rate by method, of those whose trials are all there."""
    found: dict[str, dict[float, RunRecord | None]] = {}
    for planned in cells:
        found.setdefault(planned.cell.method, {})[planned.cell.protocol.learning_rate] = store.find(planned.cell)
    trials = [read_trials(method, records) for method, records in found.items()]
    return {one.method: one.best for one in trials if one.complete}
