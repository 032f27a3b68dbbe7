"""What makes a row of the tables: a baseline, a method of this library, or a method of the `peft` package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from benchmarks.backbones.adapters import Adapters
from benchmarks.protocols.protocol import Protocol
from moepeft.errors import Unsupported
from moepeft.protocols import LinearSite


class Method(ABC):
    """One row of the tables, in one configuration.

    Attributes:
        needs_model: whether a model answers; without one the answer is a guess from the training labels.
        trains: whether weights train, so that a learning rate means something.
    """

    needs_model: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    @property
    @abstractmethod
    def name(self) -> str:
        """As written on the command line."""

    def config(self) -> dict[str, Any]:
        """The resolved configuration, as JSON holds it."""
        return {}

    def trains_under(self, protocol: Protocol) -> bool:
        """Whether weights train under this protocol."""
        return self.trains

    def at_rate(self, protocol: Protocol, rate: float) -> Protocol:
        """The protocol in which what this method trains has the learning rate."""
        return protocol.with_overrides(learning_rate=rate)

    def check(self) -> None:  # noqa: B027 - most methods can be run as asked
        """Say, before anything is loaded, whether the method can be run as asked.

        Raises:
            Unsupported: it cannot.
        """

    def attach(self, backbone: nn.Module) -> Adapters | None:
        """Make the frozen backbone ready to train; None where no adapter is put on it.

        Raises:
            Unsupported: the method cannot adapt this backbone.
            NoMatchingSite: the backbone has no layer that the method adapts.
        """
        return None

    def count(self, sites: Sequence[LinearSite]) -> int | None:
        """Trainable numbers over the sites in closed form; None where no closed form is known."""
        return None

    def size_for(self, target: int, sites: Sequence[LinearSite]) -> Method:
        """The method with about `target` trainable numbers; `Refused` where no size gives them."""
        return self


@dataclass(frozen=True)
class Refused(Method):
    """A method that cannot be run as asked. It becomes a row that says why.

    Attributes:
        method: what was asked for, as near to it as could be.
        reason: one line.
    """

    method: Method
    reason: str
    trains = False

    @property
    def name(self) -> str:
        """As written on the command line."""
        return self.method.name

    def config(self) -> dict[str, Any]:
        """The configuration that is refused."""
        return self.method.config()

    def check(self) -> None:
        """Say why not."""
        raise Unsupported(self.reason)
