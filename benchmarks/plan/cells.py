"""What is to be run: methods from the command line, and the cells they make under a protocol."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import moepeft
from benchmarks.methods.peft import SPEC_PREFIX, PeftBaseline
from benchmarks.protocols.protocol import Protocol
from benchmarks.records.schema import Cell, Tuning
from benchmarks.tasks.base import TaskData
from moepeft.config import ablations
from moepeft.errors import UnknownMethod
from moepeft.protocols import AdapterFactory
from moepeft.registry import factory_class

# No model at all; the heads alone; the model as it comes, where answers are text; every weight of the backbone.
BASELINES = ("majority", "head", "bare", "full")
HEADS_ONLY = "head"
BARE = "bare"
UNTRAINED = ("majority", BARE)
ABLATIONS = "ablations"

Method = AdapterFactory | PeftBaseline | None


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """A cell, and what is needed to run it.

    Attributes:
        cell: its identity.
        factory: of the method; None for the baselines that attach nothing.
        refusal: why it cannot be run as asked; it then becomes a row that says so.
    """

    cell: Cell
    factory: Method
    refusal: str | None = None

    @property
    def name(self) -> str:
        """The method and, of a trial, the rate."""
        trial = f" trial at {self.cell.protocol.learning_rate:g}" if self.cell.trial else ""
        return f"{self.cell.method}{trial}"

    @property
    def title(self) -> str:
        """For lines of progress."""
        return f"{self.name} seed {self.cell.seed}"


def parse_methods(text: str, *, num_tasks: int, has_heads: bool = True) -> dict[str, Method]:
    """Factories by the name they were asked for, the baselines that always run first.

    Args:
        text: comma-separated names, with or without ``@preset``; ``all`` stands for every registered method,
            ``NAME@ablations`` for a method with everything that it declares can be left out or changed,
            ``peft:NAME`` for one of the peft package.
        num_tasks: number of tasks of the protocol.
        has_heads: whether heads answer. Where answers are text there are none to train alone, but the bare model
            can be scored.

    Raises:
        UnknownMethod: a name is neither a baseline nor registered, or the baseline of the other kind of answer.
        ConfigError: the method cannot be configured for that many tasks.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    expanded = [one for name in names for one in _expanded(name)]
    ours, other = (HEADS_ONLY, BARE) if has_heads else (BARE, HEADS_ONLY)
    if other in expanded:
        reason = "its heads would be random" if has_heads else "answers are text, there are no heads"
        raise UnknownMethod(f"{other!r} means nothing for this family of models: {reason}. {ours!r} is always run.")
    return {name: _method(name, num_tasks) for name in ("majority", ours, *expanded)}


def _expanded(name: str) -> tuple[str, ...]:
    if name == "all":
        return moepeft.available()
    method, _, preset = name.partition("@")
    if preset != ABLATIONS:
        return (name,)
    declared = ablations(factory_class(method))
    if not declared:
        raise UnknownMethod(f"{method!r} declares no ablations; name one of its presets instead of {ABLATIONS!r}")
    return (method, *(f"{method}@{preset}" for preset in declared))


def _method(name: str, num_tasks: int) -> Method:
    if name in BASELINES:
        return None
    return PeftBaseline.parse(name) if name.startswith(SPEC_PREFIX) else moepeft.method(name, num_tasks=num_tasks)


def trains(method: str) -> bool:
    """Whether a row of the table comes from training, so that a learning rate means something to it."""
    return method not in UNTRAINED


def expand(
    protocol: Protocol,
    methods: Mapping[str, Method],
    data: Sequence[TaskData],
    seeds: Sequence[int],
    *,
    tuned: Tuning | None = None,
    trial: bool = False,
    refusals: Mapping[str, str] | None = None,
) -> list[PlannedCell]:
    """All cells, seed by seed. The rows' fingerprints belong to the identity: other data, other cells.

    Args:
        protocol: of all of them.
        methods: factories by name.
        data: the tasks' rows.
        seeds: each is run with every method.
        tuned: how the learning rate was found, if it was.
        trial: whether a learning rate is to be chosen by these cells.
        refusals: by name of the method, why it cannot be run as asked.
    """
    fingerprints = {task.spec.name: task.fingerprint for task in data}
    return [
        PlannedCell(
            Cell(
                protocol=protocol,
                data=fingerprints,
                method=name,
                config=_config(factory),
                seed=seed,
                tuned=tuned,
                trial=trial,
            ),
            factory,
            (refusals or {}).get(name),
        )
        for seed in seeds
        for name, factory in methods.items()
    ]


def _config(factory: Method) -> dict[str, Any]:
    if factory is None:
        return {}
    # Through JSON, so that a tuple equals the list a stored record holds.
    config: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(cast(Any, factory))))
    return config
