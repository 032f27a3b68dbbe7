"""All contestants of a comparison, and which of them take part in what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from benchmarks.protocols.protocol import UsageError
from benchmarks.speed.contestants import FROZEN, Contestant, adapted, frozen, merged, reference
from benchmarks.speed.rows import Failures, build_all
from benchmarks.speed.settings import Settings
from benchmarks.speed.workloads import Mode
from moepeft.errors import NoMatchingSite


@dataclass(frozen=True, slots=True)
class Lineup:
    """The contestants in the order of the rows.

    Attributes:
        forward_only: the bare model without gradients.
        frozen: the bare model with gradients to its first layer's input.
        others: the reference, then the methods.
        with_merged: whether those that can be merged are timed in that state as well.
        never_merged: labels of those that have no merged form of their own (naive twins).
    """

    forward_only: Contestant
    frozen: Contestant
    others: tuple[Contestant, ...]
    with_merged: bool
    never_merged: frozenset[str]

    def of(self, mode: Mode) -> list[Contestant]:
        """Who takes part: inference has no gradients, but merged models."""
        if mode == "train":
            return [self.forward_only, self.frozen, *self.others]
        there = [replace(self.forward_only, label=FROZEN)]
        for contestant in self.others:
            there.append(contestant)
            folded = merged(contestant)
            if folded is not None and self.with_merged and contestant.label not in self.never_merged:
                there.append(folded)
        return there


def line_up(host: nn.Module, settings: Settings, *, compiled: bool) -> tuple[Lineup, Failures]:
    """Build everyone on one copy of the weights; a method that cannot be attached is told with its error."""
    sites = settings.sites
    try:  # what is wrong with these is wrong with the command, not with a row
        unit = reference(host, sites, compiled=compiled)
    except NoMatchingSite as error:
        raise UsageError(f"--sites: {error}") from error
    forward_only = frozen(host, compiled=compiled, backward=False)
    bare = frozen(host, compiled=compiled, backward=True)
    builders: dict[str, Callable[[], Contestant]] = {
        name: partial(adapted, name, host, factory, sites, compiled=compiled)
        for name, factory in settings.entries.items()
    }
    methods, failures = build_all(builders)
    return Lineup(forward_only, bare, (unit, *methods), not compiled, settings.twins), failures
