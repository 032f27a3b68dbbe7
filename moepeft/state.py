"""What an attachment is made of. All of it lives on the model's modules, so a copy or a pickle takes it along.

A `Slot` stands in every adapted layer. An `Entry` stands on every module whose call begins a forward. Both lead to the
one `State` of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calls import Part
from .context import SiteContext
from .errors import NotMergeable, Unsupported
from .layouts import Place
from .protocols import AdapterFactory
from .runtime import Runtime
from .shards import laid_out
from .sites import SLOT, LeftOut, LinearSite

ENTRY = "moepeft_entry"


class Slot(nn.Module):
    """What an adapted layer carries: its adapter, its view of the runtime, the `forward` it had before.

    The first slot also registers the parameters that all sites share. A child of the model itself would be an
    obvious place, but containers such as `nn.Sequential` call every child they have.
    """

    def __init__(
        self, adapter: nn.Module, context: SiteContext, inner: Any, shared: nn.Module | None, state: State
    ) -> None:
        super().__init__()
        self.state = state
        self.parent = context.site.carrier.rpartition(".")[0]
        self.rows_second = not state.factory.capabilities.batch_first
        self.adapter = adapter
        self.context = context
        self.inner = inner
        self.shared = shared
        nested = _stands_in_a_list_of_its_block(state.model, context.site.carrier)
        self.place = Place(context.site.regrouped, nested, getattr(adapter, "streams", 1))
        self.by_row = self.by_task = False
        self.has_run = False
        self.is_transposed = False  # as its input has shown, once there were more or fewer positions than rows


class State:
    """What an attachment is made of and what `detach` must restore.

    Attributes:
        model: the adapted model.
        number: tells the attachments of one model apart.
        factory: the method's configuration.
        sites: the adapted layers, in registration order.
        shared: the module that all sites own together, if the method has one.
        runtime: what the forward under way knows.
        trained_before: name of a parameter of the bare model -> whether it trained.
        kept: site name -> the weight before `merge`; None unless merged, empty after ``merge(keep=False)``.
        base: what files say of the base, noted when the adapters were merged into its weights; None unless merged.
        merged_task: the task whose update is merged.
        steps: whether an adapter wants to know of optimiser steps (`moepeft.protocols.Stepping`).
        stepping_version: version of a parameter at the last training forward of a method that counts for `after_step`.
        chunk_sizes: name of a module -> in how many positions it computed its feed-forward network.
        without_values: an adapter that was attached on the meta device, until all of them are given values.
        left_out: layers that carry no adapter although they hold matrices, with the reason.
        train: names of the modules that train beside the adapters.
        train_per_task: names of the modules of which every task trains a copy (`moepeft.heads`).
        uses_checked: whether a training forward has shown which adapted layers run.
    """

    def __init__(
        self,
        model: nn.Module,
        factory: AdapterFactory,
        sites: tuple[LinearSite, ...],
        shared: nn.Module | None,
        left_out: tuple[LeftOut, ...] = (),
        train: tuple[str, ...] = (),
        train_per_task: tuple[str, ...] = (),
    ) -> None:
        self.model = model
        neighbours = states_of(model)
        self.number: int = 1 + max((state.number for state in neighbours), default=-1)
        self.factory: AdapterFactory = factory
        self.sites = sites
        self.shared = shared
        self.runtime = Runtime()
        self.trained_before: dict[str, bool] = (
            neighbours[0].trained_before
            if neighbours
            else {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        )
        self.kept: dict[str, Any] | None = None
        self.base: dict[str, Any] | None = None
        self.merged_task: int | None = None
        self.steps = False
        self.stepping_version = 0
        self.without_values: nn.Module | None = None
        self.left_out = left_out
        self.train = train
        self.train_per_task = train_per_task
        self.uses_checked = False
        self.chunk_sizes: dict[str, int] = {}

    @property
    def neighbours(self) -> list[State]:
        """Of the model's other attachments."""
        return [state for state in states_of(self.model) if state is not self]

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the base weights at present."""
        return self.kept is not None

    @property
    def adapters(self) -> Mapping[str, nn.Module]:
        """The adapter of every site, by site name."""
        return {site.name: self.slot(site).adapter for site in self.sites}

    @property
    def device(self) -> torch.device:
        """Where the adapters' parameters are."""
        # From the entry's adapters: to find a layer by its name takes as long as to run a small one.
        of_model = next(entry.adapters for entry in entries_of(self.model) if entry.state is self)
        modules = chain(of_model.values(), (module for _, module in self.modules()))
        return next(parameter.device for module in modules for parameter in module.parameters())

    def layer(self, site: LinearSite) -> nn.Module:
        """The frozen layer of a site, wherever it stands by now: peft wraps it and takes its name.

        Raises:
            Unsupported: another layer was put in its place.
        """
        for module in chain(_named(self.model, path_of(site)), self.model.modules()):  # the walk is rarely begun
            slot = module._modules.get(SLOT)
            if isinstance(slot, Slot) and slot.context.site.name == site.name:
                return module
        raise Unsupported(
            f"the layer {site.name!r} was replaced after attach(), and its adapter went with it: call detach(), then "
            "attach() anew"
        )

    def slot(self, site: LinearSite) -> Slot:
        """What a site's layer carries."""
        slot = self.layer(site)._modules[SLOT]
        assert isinstance(slot, Slot)
        return slot

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The module that all sites share, if there is one, and every adapter, under the names that files use."""
        if self.shared is not None:
            yield "shared", self.shared
        for site in self.sites:
            yield f"sites.{site.name}", self.slot(site).adapter

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters of the adapters, frozen ones included; shared ones first, each once."""
        for name, module in self.modules():
            for key, parameter in module.named_parameters():
                yield f"{name}.{key}", parameter

    def values(self) -> dict[str, Tensor]:
        """Everything the adapters hold, buffers included, under names free of the model's own."""
        return {f"{name}.{key}": value for name, module in self.modules() for key, value in module.state_dict().items()}

    def load_values(self, values: Mapping[str, Tensor]) -> None:
        """Load what `values` gave. Names and shapes must agree exactly. Tallies of the values before are forgotten."""
        if self.merged:
            raise NotMergeable("the adapters are merged, and new values would not show: call unmerge() first")
        unknown = sorted(set(values) - set(self.values()))
        if unknown:
            raise RuntimeError(f"the adapters have no {unknown[0]!r}, and {len(unknown)} such names were given")
        self.runtime.take_tallies()
        for name, module in self.modules():
            prefix = f"{name}."
            load_module(module, {key[len(prefix) :]: value for key, value in values.items() if key.startswith(prefix)})


def entries_of(module: nn.Module) -> tuple[Entry, ...]:
    """What a module carries whose call may begin a forward: one entry for each attachment."""
    entries: tuple[Entry, ...] = vars(module).get(ENTRY, ())
    return entries


def states_of(model: nn.Module) -> list[State]:
    """Of all attachments of a model, in the order in which they came."""
    return [entry.state for entry in entries_of(model) if entry.state.model is model]


def path_of(site: LinearSite) -> str:
    """Where the module of a site stands in an adapted model."""
    fused = site.fused
    return site.name if fused is None else f"{fused.module}.{SLOT}.{fused.expert}.{fused.parameter}"


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of an adapted layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _named(model: nn.Module, name: str) -> Iterator[nn.Module]:
    try:
        yield model.get_submodule(name)
    except AttributeError:
        return


class Entry(NamedTuple):
    """What a module whose call may begin a forward carries, for one attachment.

    Attributes:
        state: of the model.
        call_names: names of the positional arguments of its forward.
        part: what it is a part of.
        kept: `forward` and `generate` as another library had bound them before; what counts is the first entry's.
        adapters: site name -> adapter, of the sites below the module.
    """

    state: State
    call_names: tuple[str, ...]
    part: Part
    kept: Mapping[str, Any]
    adapters: Mapping[str, nn.Module]


def _stands_in_a_list_of_its_block(model: nn.Module, name: str) -> bool:
    """Whether the layer may be one of several of its block that get a choice of tokens each, whatever their name."""
    parts = name.split(".")
    above = [model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts))]
    return sum(isinstance(module, (nn.ModuleList, nn.ModuleDict)) for module in above) > 1


def load_module(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """`load_state_dict`, onto shards too."""
    own = module.state_dict()
    module.load_state_dict({key: laid_out(value, own.get(key, value)) for key, value in values.items()}, strict=True)
