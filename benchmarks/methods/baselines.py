"""Rows without adapters: what a method has to beat, and what training every weight gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from benchmarks.backbones.adapters import Adapters
from benchmarks.methods.base import Method, Refused
from benchmarks.protocols.protocol import Protocol
from benchmarks.records.identity import Baseline
from moepeft.protocols import LinearSite


@dataclass(frozen=True)
class Majority(Method):
    """The best constant guess from the training labels."""

    name = Baseline.MAJORITY
    needs_model = False
    trains = False


@dataclass(frozen=True)
class HeadsOnly(Method):
    """The task heads on the frozen backbone. Where heads start from a converged fit, they are that fit."""

    name = Baseline.HEAD

    def trains_under(self, protocol: Protocol) -> bool:
        """Not after a fit: a closed problem that is solved."""
        return protocol.head_start == "random"

    def at_rate(self, protocol: Protocol, rate: float) -> Protocol:
        """The heads have the rate, as nothing else trains."""
        return protocol.with_overrides(learning_rate=rate, head_learning_rate=rate)


@dataclass(frozen=True)
class Bare(Method):
    """The model as it comes, where answers are text."""

    name = Baseline.BARE
    trains = False


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Every weight of the backbone."""

    name = "full"

    def attach(self, backbone: nn.Module) -> Adapters | None:
        """Unfreeze all weights, in single precision: in bf16 most steps of a small rate would round to nothing."""
        backbone.float().requires_grad_(True)
        return None

    def size_for(self, target: int, sites: Sequence[LinearSite]) -> Method:
        """No size can be chosen."""
        return Refused(self, "all weights train: there is no size to choose")


BASELINES: Mapping[str, Method] = {one.name: one for one in (Majority(), HeadsOnly(), Bare(), FullFineTuning())}
