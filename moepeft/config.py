"""`MethodConfig`: the optional base of a method's configuration, and what the library asks of one beside the protocol.

`moepeft.protocols.AdapterFactory` says what every method must have. The members here are what a method may have
beside it. A factory without the base works: the functions of this module then give the defaults that the base has.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from .errors import ConfigError, Unsupported
from .protocols import AdapterFactory, Capabilities, FactoryClass, LinearSite

Purpose = Literal["task_table", "router", "core"]

# Component of a parameter's name -> what the parameter is for. What is not named here is the adapter's core.
PURPOSES: Mapping[str, Purpose] = {
    "task_embedding": "task_table",
    "gate": "router",
    "router": "router",
    "centroids": "router",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a method's authors train one setting with, and where their release says so.

    A preset holds the part that belongs to the method's configuration: rank, alpha, dropout and the like. The values
    here are for whoever trains. None means that the release does not set the value.

    Attributes:
        preset: the preset that holds the configuration's part.
        sources: name of a value, of the configuration or of the recipe -> the file of the release that sets the value.
        sites: name ends of the adapted layers.
        learning_rate: peak learning rate.
        batch_size: rows per optimiser step.
        epochs: passes over the training rows.
        warmup_steps: steps until the peak learning rate.
        weight_decay: decay of the optimiser.
        max_length: tokens per row.
    """

    preset: str
    sources: Mapping[str, str]
    sites: tuple[str, ...] | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    epochs: float | None = None
    warmup_steps: int | None = None
    weight_decay: float | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        values = {field.name for field in dataclasses.fields(self)} - {"preset", "sources"}
        unsourced = sorted(name for name in values if getattr(self, name) is not None and name not in self.sources)
        if unsourced:
            raise ConfigError(f"recipe: sources has no {', '.join(unsourced)}; name the file of the release for each")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of a method's configuration, with what most methods share.

    A subclass is a frozen dataclass. It must define `name`, `build` and `count`.

    Attributes:
        name: registered name of the method.
        presets: named sets of field values; ``published`` and ``released`` are the least.
        ablations: further presets: what can be left out of the method or changed in it to see what it does.
        sizes: the fields that scale its parameters. The benchmark turns the first before the others to bring methods
            to one size.
        recipes: setting, e.g. ``glue`` -> what the authors train the setting with.
        purposes: component of a parameter's name -> what the parameter is for; the rest is the core.
    """

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {}, "released": {}}
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    sizes: ClassVar[tuple[str, ...]] = ("rank",)
    recipes: ClassVar[Mapping[str, Recipe]] = {}
    purposes: ClassVar[Mapping[str, Purpose]] = PURPOSES

    @property
    def capabilities(self) -> Capabilities:
        """What this configuration promises: a plain LoRA's promises unless overridden."""
        return Capabilities()

    def select(self, sites: Sequence[LinearSite]) -> Sequence[LinearSite]:
        """The sites this method adapts, out of `sites`: all of them unless overridden."""
        return sites

    def shared(self, sites: Sequence[LinearSite]) -> nn.Module | None:
        """The module that all sites own together: none unless overridden."""
        return None

    @abstractmethod
    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """The adapter of one site."""

    @abstractmethod
    def count(self, sites: Sequence[LinearSite]) -> int:
        """Trainable parameters over `sites` in closed form, shared ones included."""

    def aux_loss(self, name: str, terms: Sequence[Any]) -> Tensor:
        """Combine the terms that sites recorded under `name`: a method that records none is never asked.

        Raises:
            KeyError: the method has no loss of that name.
        """
        raise KeyError(name)

    @property
    def expert_sizes(self) -> tuple[float, ...] | None:
        """What grows from expert to expert (a scale, a rank), in the order of the gates; None if experts are alike."""
        return None

    def with_tasks(self, number: int) -> Self:
        """The same configuration for `number` tasks; itself if the method knows no tasks."""
        known = {field.name for field in dataclasses.fields(self)}
        return dataclasses.replace(self, num_tasks=number) if "num_tasks" in known else self  # type: ignore[call-arg]

    def with_more_tasks(self, number: int) -> Self:
        """The same configuration for `number` tasks, of which the first compute what they do without the others.

        A field `factor_tasks` holds the T of a method with a factor 1 / T, and keeps the value of before.
        """
        known = {field.name for field in dataclasses.fields(self)}
        if "factor_tasks" not in known:
            return self.with_tasks(number)
        kept = getattr(self, "factor_tasks", None) or task_number(self)
        return dataclasses.replace(self, num_tasks=number, factor_tasks=kept)  # type: ignore[call-arg]

    def with_experts(self, number: int) -> Self:
        """The same configuration with `number` experts per site.

        Raises:
            Unsupported: the method has no experts whose number could change.
        """
        known = {field.name for field in dataclasses.fields(self)}
        if "num_experts" not in known:
            raise Unsupported(f"{self.name} has no number of experts to change")
        return dataclasses.replace(self, num_experts=number)  # type: ignore[call-arg]


# ---------------------------------------------------------------------- the same of a factory that may lack the base


def with_tasks(factory: AdapterFactory, number: int) -> AdapterFactory:
    """`MethodConfig.with_tasks` of any factory."""
    own = getattr(factory, "with_tasks", None)
    if own is not None:
        changed: AdapterFactory = own(number)
        return changed
    known = task_number(factory) is not None
    return dataclasses.replace(factory, num_tasks=number) if known else factory  # type: ignore[type-var]


def with_more_tasks(factory: AdapterFactory, number: int) -> AdapterFactory:
    """`MethodConfig.with_more_tasks` of any factory."""
    own = getattr(factory, "with_more_tasks", None)
    changed: AdapterFactory = with_tasks(factory, number) if own is None else own(number)
    return changed


def with_experts(factory: AdapterFactory, number: int) -> AdapterFactory:
    """`MethodConfig.with_experts` of any factory.

    Raises:
        Unsupported: the method has no experts whose number could change.
    """
    own = getattr(factory, "with_experts", None)
    if own is None:
        raise Unsupported(f"{factory.name} has no number of experts to change: it has no with_experts(number)")
    changed: AdapterFactory = own(number)
    return changed


def expert_sizes(factory: AdapterFactory) -> tuple[float, ...] | None:
    """`MethodConfig.expert_sizes` of any factory."""
    declared: tuple[float, ...] | None = getattr(factory, "expert_sizes", None)
    return declared


def task_number(factory: AdapterFactory) -> int | None:
    """The number of tasks that a factory was configured for; None if the method knows no tasks."""
    number: int | None = getattr(factory, "num_tasks", None)
    return number


def sizes(factory: AdapterFactory | FactoryClass) -> tuple[str, ...]:
    """`MethodConfig.sizes` of any factory."""
    declared: tuple[str, ...] = getattr(factory, "sizes", MethodConfig.sizes)
    return declared


def ablations(factory: AdapterFactory | FactoryClass) -> Mapping[str, Mapping[str, Any]]:
    """`MethodConfig.ablations` of any factory."""
    declared: Mapping[str, Mapping[str, Any]] = getattr(factory, "ablations", MethodConfig.ablations)
    return declared


def recipes(factory: AdapterFactory | FactoryClass) -> Mapping[str, Recipe]:
    """`MethodConfig.recipes` of any factory."""
    declared: Mapping[str, Recipe] = getattr(factory, "recipes", MethodConfig.recipes)
    return declared


def purpose(factory: AdapterFactory | FactoryClass, parameter: str) -> Purpose:
    """What a parameter is for, by its name within its adapter or shared module, e.g. ``gate.weight``."""
    declared: Mapping[str, Purpose] = getattr(factory, "purposes", PURPOSES)
    named = [declared[part] for part in parameter.split(".") if part in declared]
    return named[0] if named else "core"
