"""The matched track: sizes chosen so that all methods have about as many trainable numbers as the reference.

Only the rank moves, by the method's own closed form and under its own validation; alpha stays, so a scale alpha / r
moves with it, which a tuned learning rate takes up. A method whose rank alone cannot do it may name further size
fields in a class attribute, the one to turn first at the head: ``sizes: ClassVar = ("rank", "num_experts")``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from benchmarks.backbones.load import (
    BackboneSource,
    BackboneUnavailable,
    load_backbone,
    model_class,
    without_pooler,
)
from benchmarks.methods.peft import PeftBaseline
from benchmarks.plan.cells import Method, parse_methods
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Family, Suite
from moepeft import config
from moepeft.errors import ConfigError, NoMatchingSite, Unsupported
from moepeft.protocols import AdapterFactory, LinearSite
from moepeft.sites import find_sites, select_sites

TOLERANCE = 0.05
HIGHEST = 4096


@dataclass(frozen=True, slots=True)
class Match:
    """The size of a method that is nearest to a target.

    Attributes:
        factory: the method at that size.
        count: its trainable numbers.
        target: what they should be.
    """

    factory: AdapterFactory
    count: int
    target: int

    @property
    def agrees(self) -> bool:
        """Whether the count is within the tolerance."""
        return abs(self.count - self.target) <= TOLERANCE * self.target

    @property
    def refusal(self) -> str | None:
        """One line for the row of a method that cannot be matched; None if it is."""
        if self.agrees:
            return None
        fields = sizes_of(self.factory)
        values = ", ".join(f"{field} {getattr(self.factory, field)}" for field in fields)
        return (
            f"no {' and '.join(fields)} gives within {TOLERANCE:.0%} of {self.target:,} trainable numbers: "
            f"the nearest is {self.count:,} at {values}"
        )


def matched_methods(
    suite: Suite, methods: Mapping[str, Method], source: BackboneSource
) -> tuple[Suite, dict[str, Method], dict[str, str]]:
    """Bring all methods to one size.

    Returns:
        The suite with the target in numbers; the methods, each at its nearest size; by name, why one cannot be run.

    Raises:
        UsageError: there is no reference to match.
    """
    sites = backbone_sites(source, suite.family)
    target = suite.target_parameters
    if target is None:
        assert suite.reference is not None
        reference = parse_methods(suite.reference, num_tasks=len(suite.tasks))[suite.reference]
        if reference is None or isinstance(reference, PeftBaseline):
            raise UsageError(f"the size of {suite.reference} is known in no closed form; give --target-parameters")
        target = count(reference, sites)
    found: dict[str, Method] = {}
    refusals: dict[str, str] = {}
    for name, factory in methods.items():
        found[name], refusal = _matched(name, factory, sites, target)
        if refusal is not None:
            refusals[name] = refusal
    return suite.with_overrides(target_parameters=target), found, refusals


def _matched(name: str, factory: Method, sites: Sequence[LinearSite], target: int) -> tuple[Method, str | None]:
    if factory is None:
        return None, "all weights train: there is no size to choose" if name == "full" else None
    if isinstance(factory, PeftBaseline):
        return factory, "its size is known in no closed form, and is not chosen here"
    try:
        match = nearest(factory, sites, target)
    except (NoMatchingSite, Unsupported):
        return factory, None  # it cannot work on this backbone at all, and says so itself when it is attached
    return match.factory, match.refusal


def nearest(factory: AdapterFactory, sites: Sequence[LinearSite], target: int) -> Match:
    """The size whose count is nearest to `target`; of equals the smaller one.

    The first size field is turned alone; only if that is not near enough are the others, and then what changes them
    least is taken.

    Raises:
        Unsupported: the method cannot adapt these sites.
    """
    first, *others = sizes_of(factory)
    best: Match | None = None
    for variant in (factory, *_variants(factory, others)):
        for candidate in _turned(variant, first, sites, target):
            if best is None or abs(candidate.count - target) < abs(best.count - target):
                best = candidate
        if best is not None and best.agrees:
            return best
    if best is None:
        raise Unsupported(f"{factory.name}: no {first} from 1 to {HIGHEST} is valid")
    return best


def sizes_of(factory: AdapterFactory) -> tuple[str, ...]:
    """Names of the fields that may be turned to reach a size."""
    fields = {field.name for field in dataclasses.fields(cast(Any, factory))}
    return tuple(name for name in config.sizes(factory) if name in fields)


def _variants(factory: AdapterFactory, fields: Sequence[str]) -> Iterator[AdapterFactory]:
    """The factory with other values of its further sizes, from 1 to twice their own, the nearest ones first."""
    for field in fields:
        own = int(getattr(factory, field))
        for value in sorted(range(1, 2 * own + 1), key=lambda value: (abs(value - own), value)):
            # The first size must not forbid the value: it is set anew in any case.
            valid = _valid(factory, {field: value}) or _valid(factory, {field: value, sizes_of(factory)[0]: value})
            if value != own and valid is not None:
                yield valid


def _turned(factory: AdapterFactory, field: str, sites: Sequence[LinearSite], target: int) -> Iterator[Match]:
    for value in range(1, HIGHEST + 1):
        candidate = _valid(factory, {field: value})
        if candidate is None:
            continue
        match = Match(candidate, count(candidate, sites), target)
        yield match
        if match.count > target:
            return  # counts only grow from here


def _valid(factory: AdapterFactory, values: Mapping[str, int]) -> AdapterFactory | None:
    try:
        return cast(AdapterFactory, dataclasses.replace(cast(Any, factory), **values))
    except ConfigError:
        return None


def count(factory: AdapterFactory, sites: Sequence[LinearSite]) -> int:
    """Trainable numbers in closed form, over the sites that the method takes of `sites`."""
    return factory.count(tuple(factory.select(sites)))


# ---------------------------------------------------------------------- sites without weights


def backbone_sites(source: BackboneSource, family: Family) -> tuple[LinearSite, ...]:
    """The linear layers of a backbone that methods may adapt; built without weights, but for the tiny ones."""
    return select_sites(find_sites(_skeleton(source, family)), None)


def _skeleton(source: BackboneSource, family: Family) -> nn.Module:
    if source.location is None:
        return load_backbone(source, family, dropout=None)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.location, revision=source.revision or "main")
    except OSError as error:
        first_line = str(error).strip().splitlines()[0]
        raise BackboneUnavailable(
            f"the configuration of backbone {source.identity} cannot be loaded from {source.location}: {first_line}; "
            "give a local folder with --backbone FOLDER, or allow access to the hub (HF_HUB_OFFLINE unset)"
        ) from error
    with torch.device("meta"):
        model: nn.Module = model_class(config, family, source.identity).from_config(config)
    return without_pooler(model)
