"""The size of a method that is nearest to a number of trainable numbers.

Only the rank moves, by the method's own closed form and under its own validation; alpha stays, so a scale alpha / r
moves with it, which a tuned learning rate takes up. A method whose rank alone cannot do it may name further size
fields in a class attribute, the one to turn first at the head: ``sizes: ClassVar = ("rank", "num_experts")``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from moepeft import config
from moepeft.errors import ConfigError, Unsupported
from moepeft.protocols import AdapterFactory, LinearSite

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
