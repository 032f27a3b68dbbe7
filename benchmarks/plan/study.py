"""What one command compares: methods on the rows of tasks, under the protocol of a suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.backbones.device import resolve_precision
from benchmarks.backbones.load import BackboneSource
from benchmarks.families import FAMILIES
from benchmarks.methods.base import Method
from benchmarks.methods.parse import parse_method, parse_methods
from benchmarks.plan.cells import PlannedCell, expand
from benchmarks.plan.options import Options
from benchmarks.plan.track import apply_track
from benchmarks.plan.tuning import Tuned, tune, tuned_cells
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Suite
from benchmarks.records.store import Store
from benchmarks.tasks import load_task
from benchmarks.tasks.base import TaskData
from benchmarks.tasks.resplit import resplit
from moepeft.errors import UnknownMethod


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared.

    Attributes:
        suite: with backbone, precision and target size resolved.
        methods: by name, in the size they are to have.
        data: the tasks' rows.
    """

    suite: Suite
    methods: Mapping[str, Method]
    data: tuple[TaskData, ...]

    def tune(self, trials: Store) -> Tuned:
        """Which trials are needed, by those that are there, and the rates that are decided."""
        return tune(self.suite, self.methods.values(), self.data, trials)

    def reported(self, rates: Mapping[str, float], undecided: frozenset[str] = frozenset()) -> list[PlannedCell]:
        """The reported cells.

        Args:
            rates: the chosen rate by method, where rates are tuned.
            undecided: methods that have no rate yet; they are left out.
        """
        methods = [method for name, method in self.methods.items() if name not in undecided]
        if self.suite.tuning_rates:
            return tuned_cells(self.suite, methods, self.data, rates)
        return expand(self.suite.protocol, methods, self.data, self.suite.seeds)


def resolve_study(options: Options, suite: Suite, source: BackboneSource, device_type: str, store: Store) -> Study:
    """Read the methods and the rows that a command asks for; the rows last.

    Raises:
        UsageError: the reference is no method, or nothing can be brought to its size.
        UnknownMethod, ConfigError: a method is unknown, or cannot be configured for these tasks.
        DataUnavailable, InvalidData: the rows cannot be had or used.
    """
    tasks = len(suite.tasks)
    methods = parse_methods(options.methods, num_tasks=tasks, has_heads=FAMILIES[suite.family].has_heads)
    if suite.reference is not None:
        try:
            parse_method(suite.reference, tasks)
        except UnknownMethod as error:
            raise UsageError(f"--reference {suite.reference}: {error}") from error
    _require_row(options.reference, suite, methods, store)
    precision = resolve_precision(suite.precision, device_type)
    suite, methods = apply_track(suite.with_overrides(backbone=source.identity, precision=precision), methods, source)
    data = tuple(load_task(name, data_dir=options.data_dir) for name in suite.tasks)
    if suite.test_rows is not None:
        data = tuple(resplit(task, suite.test_rows) for task in data)
    # The tasks of own data were paths until here.
    return Study(suite.with_overrides(tasks=tuple(task.spec.name for task in data)), methods, data)


def _require_row(reference: str | None, suite: Suite, methods: Mapping[str, Method], store: Store) -> None:
    """Refuse a reference that no row stands for; one that gives only the size of others needs no row."""
    if reference is None or reference in methods or suite.track == "matched":
        return
    if not any(record.cell.method == reference for record in store.all()):
        raise UsageError(f"--reference {reference}: no run of it is asked for or stored; add it to --methods")
