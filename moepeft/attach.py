"""Put a method's adapters around a model's frozen layers, and take them off again. `moepeft.hooks` says how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import merging, saving
from .context import Runtime
from .counting import ParameterCount, count_parameters
from .errors import AlreadyAttached, AuxLossDetached, Unsupported
from .hooks import ENTRY, SLOT, Entry, Slot, State, checked_ids, install, remove
from .protocols import AdapterFactory, LinearSite
from .shards import is_sharded, laid_out
from .sites import SitePattern, find_sites, select_sites


class Attachment:
    """Handle on the adapters of one model. Made by `attach`, `load`, and `attachment` for a copied model.

    Attributes:
        model: the adapted model. All state lives in it; the handle has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def factory(self) -> AdapterFactory:
        """The method's configuration."""
        return self._state.factory

    @property
    def sites(self) -> tuple[LinearSite, ...]:
        """The adapted layers, in registration order."""
        return self._state.sites

    # ------------------------------------------------------------------ parameters

    @property
    def runtime(self) -> Runtime:
        """State of the current forward pass."""
        return self._state.runtime

    @property
    def shared(self) -> nn.Module | None:
        """The module all sites own together, if the method has one."""
        return self._state.shared

    @property
    def adapters(self) -> Mapping[str, nn.Module]:
        """The adapter of every site, by site name."""
        return {site.name: self._slot(site).adapter for site in self.sites}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable adapter parameters; shared ones first, each once, under the names `save` uses."""
        for name, module in self.modules():
            for key, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{name}.{key}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable adapter parameters, for the optimiser."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the adapters hold, buffers included, under names free of the model's own."""
        return {f"{name}.{key}": value for name, module in self.modules() for key, value in module.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` gave. Names and shapes must agree exactly (`moepeft.load` checks them first)."""
        for name, module in self.modules():
            prefix = f"{name}."
            _load(module, {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the adapters anew and in place, as `attach` did: parameters, buffers and constants.

        A model made on the meta device needs it once `to_empty` has given it memory, before values are loaded.

        Raises:
            Unsupported: an adapted layer is on the meta device still.
        """
        home = next(self.module(self.sites[0]).parameters()).device
        if home.type == "meta":
            raise Unsupported("the model is on the meta device: give it memory first, by model.to_empty(device=...)")
        shared, built = _drawn(self.factory, self.sites)
        for (_, module), drawn in zip(self.modules(), [*([] if shared is None else [shared]), *built], strict=True):
            if _on_meta(module):  # memory was given to the base alone
                module.to_empty(device=home)
            _load(module, drawn.state_dict())
            constants = dict(drawn.named_buffers())
            for key, buffer in module.named_buffers():
                buffer.copy_(constants[key])
        self._state.without_values = None

    def parameter_count(self) -> ParameterCount:
        """Trainable numbers, measured on the modules and by the method's closed form."""
        return count_parameters(self)

    def summary(self) -> str:
        """A few lines for a person: method, sites by role, parameters."""
        roles = {site.role: 0 for site in self.sites}
        for site in self.sites:
            roles[site.role] += 1
        count = self.parameter_count()
        share = count.total / max(count.base, 1)
        return (
            f"{self.factory}\n"
            f"{len(self.sites)} sites: {', '.join(f'{role} x {number}' for role, number in roles.items())}\n"
            f"{count.total:,} trainable parameters, {count.shared:,} of them shared by all sites; "
            f"{share:.2%} of {count.base:,} frozen ones"
        )

    # ------------------------------------------------------------------ losses and routing

    def aux_losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the last forward by name, coefficients included.

        Raises:
            AuxLossDetached: the model trains but a loss has no gradient, as under reentrant checkpointing.
        """
        losses = {}
        for name, terms in self.runtime.losses.items():
            value = self.factory.aux_loss(name, [_widened(term) for term in terms.values()])
            if self.runtime.grad_expected and not value.requires_grad:
                raise AuxLossDetached(
                    f"the auxiliary loss {name!r} has no gradient although the model is training: reentrant gradient "
                    "checkpointing drops it. Call model.gradient_checkpointing_enable("
                    "gradient_checkpointing_kwargs={'use_reentrant': False})"
                )
            losses[name] = value
        return losses

    def aux_loss(self) -> Tensor:
        """Sum of `aux_losses`, to be added to the task loss; a zero without graph when the method has none."""
        losses = self.aux_losses()
        if losses:
            return torch.stack(list(losses.values())).sum()
        return torch.zeros((), device=next(self.parameters()).device)

    @contextmanager
    def route(self, *, task_ids: Tensor | list[int] | int) -> Iterator[None]:
        """Route every call inside by these ids; for `generate`, whose keywords are fixed.

        Args:
            task_ids: one id per row, or a single one for all rows.
        """
        ids = checked_ids(self._state, task_ids, {"like": next(self.parameters())})
        before, self.runtime.routed = self.runtime.routed, ids
        try:
            yield
        finally:
            self.runtime.routed = before

    def synchronise(self, wanted: bool = True) -> None:
        """Let data-parallel processes train as one process with their joint batch.

        Without it a balance loss (MixLoRA) and routing by batch (TuckA) see the rows of their own process only: the
        gradients are the mean over the processes' batches, as with accumulation. With it every training forward
        exchanges some numbers between the processes, so all must make the same number of them; evaluation does not.
        """
        self.runtime.synchronised = wanted

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes bit for bit what it computes without adapters."""
        before, self.runtime.enabled = self.runtime.enabled, False
        try:
            yield
        finally:
            self.runtime.enabled = before

    @contextmanager
    def recording(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        """Collect routing statistics: site name -> name -> tensor of the last forward inside."""
        self.runtime.recording, self.runtime.stats = True, {}
        try:
            yield self.runtime.stats
        finally:
            self.runtime.recording = False

    # ------------------------------------------------------------------ merging, saving, leaving

    def merge(self, *, task: int | None = None) -> None:
        """Fold the update into the base weights; the adapters rest until `unmerge`.

        Args:
            task: which task's update; needed by methods that route by task, refused by those that do not.

        Raises:
            NotMergeable: the update depends on the input, a weight is quantised, or the result is not finite.
        """
        self._state.kept = merging.merge(self, task)
        self._state.merged_task = task

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit, and the adapters to work."""
        merging.unmerge(self, self._state.kept)
        self._state.kept = self._state.merged_task = None

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the base weights at present."""
        return self._state.kept is not None

    def save(self, folder: str | Path) -> None:
        """Write ``adapter.safetensors`` and ``adapter.json`` into `folder`, which is made if need be.

        Where parameters are sharded (FSDP) every process must call it: each gathers and writes all of them.
        """
        saving.save(self, Path(folder))

    def restore(self, folder: str | Path) -> None:
        """Give the adapters the values that `save` wrote of others of the same method, configuration and sites.

        The modules stay, and so do the optimisers and wrappers that hold their parameters, sharded ones included
        (FSDP), where every process must call it.

        Raises:
            AdapterFileError: the files are damaged or for other adapters; nothing was changed.
        """
        saving.restore(self, Path(folder))

    def detach(self) -> nn.Module:
        """Take the adapters off; the model is exactly what it was before `attach`."""
        if self.merged:
            self.unmerge()
        trained_before = self._state.trained_before
        remove(self.model, self.sites)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trained_before[name])
        return self.model

    # ------------------------------------------------------------------ inside

    def module(self, site: LinearSite) -> nn.Module:
        """The frozen layer of a site."""
        return self.model.get_submodule(site.name)

    @property
    def _state(self) -> State:
        entry: Entry = getattr(self.model, ENTRY)
        return entry.state

    def _slot(self, site: LinearSite) -> Slot:
        slot = getattr(self.module(site), SLOT)
        assert isinstance(slot, Slot)
        return slot

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The module that all sites share, if there is one, and every adapter, under the names `save` uses."""
        if self._state.shared is not None:
            yield "shared", self._state.shared
        for site in self.sites:
            yield f"sites.{site.name}", self._slot(site).adapter


def attach(model: nn.Module, factory: AdapterFactory, sites: SitePattern | None = None) -> Attachment:
    """Freeze `model` and put the method's adapters around its linear layers.

    Args:
        model: any module with linear layers. Its own `forward` is what the user goes on calling.
        factory: the method's configuration, e.g. ``EPT(rank=8, num_tasks=8)``.
        sites: which layers; see `moepeft.sites.select_sites`. None: all linear layers of the repeated blocks.

    Raises:
        NoMatchingSite: `sites` matches nothing.
        Unsupported: the method cannot work on this model, or its weights are sharded already.
        AlreadyAttached: the model has adapters.
    """
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise Unsupported(
            "the model's weights are sharded, and its processes would train other adapters each: attach first, then "
            "shard the model with them; saved values are read by their restore() afterwards"
        )
    if any(hasattr(module, SLOT) for module in model.modules()):
        raise AlreadyAttached("the model has adapters already: call detach() on their attachment first")
    chosen = tuple(factory.select(select_sites(find_sites(model), sites)))
    if not chosen:
        raise Unsupported(f"{factory.name} can adapt none of the chosen layers")
    shared, built = _drawn(factory, chosen)
    state = State(model, factory, chosen, shared)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    install(model, state, built)
    if _on_meta(built[0]):
        state.without_values = built[0]
    return Attachment(model)


def attachment(model: nn.Module) -> Attachment:
    """The handle on a model that carries adapters, such as a deep copy or an unpickled one.

    Raises:
        Unsupported: the model carries none.
    """
    if not hasattr(model, ENTRY):
        raise Unsupported(f"this {type(model).__name__} carries no adapters: call attach() on it first")
    return Attachment(model)


def _drawn(factory: AdapterFactory, sites: tuple[LinearSite, ...]) -> tuple[nn.Module | None, list[nn.Module]]:
    """What all sites share, and an adapter for each of them, with first values."""
    shared = factory.shared(sites)
    return shared, [factory.build(site, shared) for site in sites]


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = module.state_dict()
    module.load_state_dict({key: laid_out(value, own.get(key, value)) for key, value in state.items()}, strict=True)


def _on_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _widened(term: Any) -> Any:
    return term.float() if isinstance(term, Tensor) and term.dtype.itemsize < 4 else term
