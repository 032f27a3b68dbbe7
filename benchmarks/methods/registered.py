"""A method of this library: a configuration that `moepeft.attach` takes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

import moepeft
from benchmarks.backbones.adapters import Adapters
from benchmarks.methods.base import Method, Refused
from benchmarks.methods.matching import count, nearest
from moepeft.errors import NoMatchingSite, Unsupported
from moepeft.protocols import AdapterFactory, LinearSite


@dataclass(frozen=True)
class Moepeft(Method):
    """A registered method.

    Attributes:
        spec: as written on the command line: name, or name@preset.
        factory: its configuration.
    """

    spec: str
    factory: AdapterFactory

    @property
    def name(self) -> str:
        """As written on the command line."""
        return self.spec

    def config(self) -> dict[str, Any]:
        """Every field with its value. It goes through JSON, so that a tuple equals the list that a record holds."""
        config: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(cast(Any, self.factory))))
        return config

    def attach(self, backbone: nn.Module) -> Adapters:
        """The adapters on their sites."""
        return moepeft.attach(backbone, self.factory)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """By the method's own closed form, over the sites that it takes."""
        return count(self.factory, sites)

    def size_for(self, target: int, sites: Sequence[LinearSite]) -> Method:
        """The method at its nearest size."""
        try:
            match = nearest(self.factory, sites, target)
        except (NoMatchingSite, Unsupported):
            return self  # it cannot work on this backbone at all, and says so itself when it is attached
        sized = dataclasses.replace(self, factory=match.factory)
        return sized if match.refusal is None else Refused(sized, match.refusal)
