"""The types a method and the rest of the library share. Types only, no logic.

The way of the data: `moepeft.sites` describes a model as `LinearSite`s; an `AdapterFactory` (a method's configuration)
picks some of them and builds one `Adapter` per site; `moepeft.attach` puts each adapter around its frozen layer and
hands it, call by call, the input, the frozen layer as a callable, and a `moepeft.context.SiteContext` that knows the
rows' tasks and the padding mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from .context import SiteContext
from .roles import Role, Stream
from .sites import LinearSite

__all__ = [
    "Adapter",
    "AdapterFactory",
    "Base",
    "Capabilities",
    "FactoryClass",
    "LinearSite",
    "LoRAShaped",
    "Mergeable",
    "Preparing",
    "Role",
    "Routing",
    "Stream",
]

Routing = Literal["none", "task", "token", "batch"]


@runtime_checkable
class Base(Protocol):
    """The frozen layer as a function: call it on any input, once, several times or not at all."""

    def __call__(self, x: Tensor) -> Tensor:
        """W0 x + b, with whatever hooks other libraries put on the layer."""
        ...


@runtime_checkable
class Adapter(Protocol):
    """What a factory builds for one site: an `nn.Module` whose parameters are the only ones that train."""

    def forward(self, x: Tensor, base: Base, ctx: SiteContext) -> Tensor:
        """Compute the adapted layer's output.

        Args:
            x: the layer's input, shape (rows, ..., in_features).
            base: the frozen layer.
            ctx: tasks of the rows, padding mask, and the place to record losses.

        Returns:
            Shape (rows, ..., out_features), in the dtype of ``base(x)``.
        """
        ...


@runtime_checkable
class Mergeable(Protocol):
    """An adapter whose effect on a given task is a fixed change of the weight."""

    def delta_weight(self, task: int | None) -> Tensor:
        """The update W - W0 of shape (out_features, in_features) for rows of `task`."""
        ...


@runtime_checkable
class LoRAShaped(Protocol):
    """An adapter whose update for a given task is one LoRA: scale * B A. Optional; what has it exports as LoRA."""

    scale: float

    def lora_factors(self, task: int | None) -> tuple[Tensor, Tensor]:
        """A (r, in_features) and B (out_features, r) for rows of `task`; r is the same at every site."""
        ...


@runtime_checkable
class RoutedUpdate(Protocol):
    """An adapter whose input chooses its update, fixed once its routing is. Optional; exports for a routing."""

    def fixed_update(self, gates: Tensor, weight: Tensor) -> Tensor:
        """The update W - W0 of shape (out_features, in_features) where every forward is routed alike.

        Args:
            gates: the weight of every expert, (experts,), as the statistic ``gates`` gives it.
            weight: the frozen W0.
        """
        ...


@runtime_checkable
class Stepping(Protocol):
    """An adapter that changes itself after every optimiser step, as one that balances its experts without a loss.

    Optional. Its training forwards count with `SiteContext.tally`; `Attachment.after_step` hands it the sum.
    """

    def after_step(self, counts: Tensor) -> None:
        """Change the adapter's buffers.

        Args:
            counts: the tallies of all training forwards since the last optimiser step, summed, over all processes.
        """
        ...


@runtime_checkable
class Preparing(Protocol):
    """A factory that makes some of what its adapters need for all of them at once, when a forward begins. Optional.

    An adapter finds its part by `SiteContext.prepared`. Where it finds none, it makes its own: definitions, compiled
    graphs, sharded parameters and layers called by themselves go site by site.
    """

    def prepare(self, adapters: Sequence[nn.Module], task_sets: Tensor | None) -> Sequence[Any]:
        """What each of the adapters needs; nothing at all where they had better make their own.

        Args:
            adapters: of sites below the called module, on one device.
            task_sets: tasks (rows, ids) of the rows of the call; None where none were given, or one per position.
        """
        ...


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a configured method promises; the contract tests assert each field, both ways.

    Attributes:
        routing: what chooses the experts.
        not_mergeable: why `merge` must refuse; None when merging is exact.
        identity_at_init: a freshly attached model computes what the bare model computes.
        row_independent: a row's output does not depend on the other rows of its batch.
        padding_independent: a row's output does not depend on how much padding follows it.
        cache_consistent: generating with a key-value cache equals recomputing the whole sequence. False: what chooses
            the experts sees a row's later tokens too, answers included, unless they are masked.
        adapts_positions: a table of relative positions that goes through the same layers as the rows (DeBERTa's) is
            adapted and routed by as if it were a batch. False: an update that depends on the row leaves it alone.
        batch_first: rows are the first dimension of the input, as in every transformers model.
        aux_losses: names of the auxiliary losses it records while training.
        never_trained: name endings of adapter parameters that no loss reaches (a defect of a release, reproduced).
    """

    routing: Routing = "none"
    not_mergeable: str | None = None
    identity_at_init: bool = True
    row_independent: bool = True
    padding_independent: bool = True
    cache_consistent: bool = True
    adapts_positions: bool = False
    batch_first: bool = True
    aux_losses: tuple[str, ...] = ()
    never_trained: tuple[str, ...] = ()


@runtime_checkable
class AdapterFactory(Protocol):
    """A method. Its frozen-dataclass configuration is its factory: equality, repr and JSON come with it.

    Attributes:
        name: registered name of the method, e.g. ``lora``.
        presets: named sets of field values; every method has at least ``published`` and ``released``.

    A class attribute ``sizes`` may name the fields that scale its parameters, where they are more than ``rank``: the
    benchmark turns them, the first before the others, to bring methods to one size. A class attribute ``ablations``
    may hold further presets: what can be left out of the method or changed in it to see what it does.
    """

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    @property
    def capabilities(self) -> Capabilities:
        """What this configuration promises."""
        ...

    def select(self, sites: Sequence[LinearSite]) -> Sequence[LinearSite]:
        """The sites this method adapts, out of those the user asked for; raises `Unsupported` if it can use none."""
        ...

    def shared(self, sites: Sequence[LinearSite]) -> nn.Module | None:
        """Parameters that all sites own together (a gate, centroids, routers), or None."""
        ...

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """The `Adapter` of one site. It must not register `shared` or a part of it as its own submodule."""
        ...

    def count(self, sites: Sequence[LinearSite]) -> int:
        """Trainable parameters over `sites` in closed form, shared ones included."""
        ...

    def aux_loss(self, name: str, terms: Sequence[Any]) -> Tensor:
        """Combine what the sites recorded under `name` to the scalar that is added to the training loss.

        Each a tensor, in float32 at least, or whatever else the method's adapters give to `SiteContext.loss`.
        """
        ...


@runtime_checkable
class FactoryClass(Protocol):
    """A method before it is configured: the class whose instances are its factories."""

    __name__: str
    name: str
    presets: Mapping[str, Mapping[str, Any]]

    def __call__(self, **fields: Any) -> AdapterFactory:
        """A configuration; fields that are not named have their defaults."""
        ...
