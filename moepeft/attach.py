"""Put a method's adapters around a model's frozen layers, and take them off again.

How it works. Every adapted layer gets one child module, `moepeft` (a `Slot` with the adapter), and its `forward` is
bound on the instance to a `functools.partial` of a module-level function; the class, the layer's own parameters and
their names stay as they were, so base checkpoints load as before. The model's root gets a forward pre-hook that takes
``task_ids`` out of the call and reads the padding masks; so does the encoder of an encoder-decoder model, which
`generate` calls on its own. All state is reached through the modules, never through a
closure: a deep copy or a pickle of the model is independent and complete.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import io, merge
from .context import Runtime, SiteContext
from .counting import ParameterCount, count_parameters
from .errors import AlreadyAttached, AuxLossDetached, MissingRouting, Unsupported
from .protocols import AdapterFactory, LinearSite, Stream
from .sites import SitePattern, find_sites, select_sites

ROOT = "moepeft_root"
SLOT = "moepeft"
ENTRY = "moepeft_entry"


class Slot(nn.Module):
    """What an adapted layer carries: its adapter, its view of the runtime, the `forward` it had before."""

    def __init__(self, adapter: nn.Module, context: SiteContext, inner: Any) -> None:
        super().__init__()
        self.adapter = adapter
        self.context = context
        self.inner = inner


class Root(nn.Module):
    """What the adapted model carries at its root: the shared parameters, the runtime, and what `detach` must restore.

    It is the only place that knows of the attachment, so that a copy of the model has an attachment of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        factory: AdapterFactory,
        sites: tuple[LinearSite, ...],
        shared: nn.Module | None,
    ) -> None:
        super().__init__()
        self.shared = shared
        self.factory = factory
        self.sites = sites
        self.runtime = Runtime(shared=shared)
        self.trained_before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.kept: dict[str, Tensor] | None = None
        self.merged_task: int | None = None


class Entry(NamedTuple):
    """What a module whose call begins a forward pass carries; a tuple, so that the root is not registered twice."""

    root: Root
    call_names: tuple[str, ...]


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
        return self._root.factory

    @property
    def sites(self) -> tuple[LinearSite, ...]:
        """The adapted layers, in registration order."""
        return self._root.sites

    # ------------------------------------------------------------------ parameters

    @property
    def runtime(self) -> Runtime:
        """State of the current forward pass."""
        return self._root.runtime

    @property
    def shared(self) -> nn.Module | None:
        """The module all sites own together, if the method has one."""
        return self._root.shared

    @property
    def adapters(self) -> Mapping[str, nn.Module]:
        """The adapter of every site, by site name."""
        return {site.name: self._slot(site).adapter for site in self.sites}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable adapter parameters; shared ones first, each once, under the names `save` uses."""
        for name, module in self._modules():
            for key, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{name}.{key}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable adapter parameters, for the optimiser."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the adapters hold, buffers included, under names free of the model's own."""
        return {
            f"{name}.{key}": value for name, module in self._modules() for key, value in module.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` gave. Names and shapes must agree exactly (`moepeft.load` checks them first)."""
        for name, module in self._modules():
            prefix = f"{name}."
            part = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
            module.load_state_dict(part, strict=True)

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
            value = self.factory.aux_loss(
                name, [term.float() if term.dtype.itemsize < 4 else term for term in terms.values()]
            )
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
        ids = _checked_ids(self._root, task_ids, {"like": next(self.parameters())})
        before, self.runtime.routed = self.runtime.routed, ids
        try:
            yield
        finally:
            self.runtime.routed = before

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
        self._root.kept = merge.merge(self, task)
        self._root.merged_task = task

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit, and the adapters to work."""
        merge.unmerge(self, self._root.kept)
        self._root.kept = self._root.merged_task = None

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the base weights at present."""
        return self._root.kept is not None

    def save(self, folder: str | Path) -> None:
        """Write ``adapter.safetensors`` and ``adapter.json`` into `folder`, which is made if need be."""
        io.save(self, Path(folder))

    def detach(self) -> nn.Module:
        """Take the adapters off; the model is exactly what it was before `attach`."""
        if self.merged:
            self.unmerge()
        trained_before = self._root.trained_before
        for site in self.sites:
            unbind(self.module(site))
            delattr(self.module(site), SLOT)
        for entry in _entries(self.model):
            _remove_hooks(entry)
        delattr(self.model, ROOT)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trained_before[name])
        return self.model

    # ------------------------------------------------------------------ inside

    def module(self, site: LinearSite) -> nn.Module:
        """The frozen layer of a site."""
        return self.model.get_submodule(site.name)

    @property
    def _root(self) -> Root:
        root = getattr(self.model, ROOT)
        assert isinstance(root, Root)
        return root

    def _slot(self, site: LinearSite) -> Slot:
        slot = getattr(self.module(site), SLOT)
        assert isinstance(slot, Slot)
        return slot

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        if self._root.shared is not None:
            yield "shared", self._root.shared
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
        Unsupported: the method cannot work on this model.
        AlreadyAttached: the model has adapters.
    """
    if hasattr(model, ROOT) or any(hasattr(module, SLOT) for module in model.modules()):
        raise AlreadyAttached("the model has adapters already: call detach() on their attachment first")
    chosen = tuple(factory.select(select_sites(find_sites(model), sites)))
    if not chosen:
        raise Unsupported(f"{factory.name} can adapt none of the chosen layers")
    shared = factory.shared(chosen)
    built = [factory.build(site, shared) for site in chosen]

    root = Root(model, factory, chosen, shared)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for site, adapter in zip(chosen, built, strict=True):
        module = model.get_submodule(site.name)
        slot = Slot(adapter, SiteContext(root.runtime, site), module.__dict__.get("forward"))
        setattr(module, SLOT, slot.to(next(module.parameters()).device).train(module.training))
        bind(module)
    setattr(model, ROOT, root.to(next(model.parameters()).device).train(model.training))
    for entry in _entries(model):
        setattr(entry, ENTRY, Entry(root, tuple(inspect.signature(entry.forward).parameters)))
        entry.register_forward_pre_hook(_before_forward, with_kwargs=True)
        entry.register_forward_hook(_after_forward, always_call=True)
    return Attachment(model)


def attachment(model: nn.Module) -> Attachment:
    """The handle on a model that carries adapters, such as a deep copy or an unpickled one.

    Raises:
        Unsupported: the model carries none.
    """
    if not hasattr(model, ROOT):
        raise Unsupported(f"this {type(model).__name__} carries no adapters at its root: call attach() on it first")
    return Attachment(model)


def bind(module: nn.Module) -> None:
    """Let the layer's adapter answer its calls."""
    # A partial of a module-level function pickles and deep-copies; a bound method does not.
    module.forward = functools.partial(_adapted_forward, module)


def unbind(module: nn.Module) -> None:
    """Give the layer its own `forward` back."""
    slot = getattr(module, SLOT)
    del module.forward
    if slot.inner is not None:  # another library's hook (accelerate's) was bound before ours
        module.forward = slot.inner


def _adapted_forward(module: nn.Module, x: Tensor) -> Tensor:
    slot: Slot = module.moepeft  # type: ignore[assignment]
    if not slot.context.runtime.enabled:
        return _frozen_forward(module, x)
    output: Tensor = slot.adapter(x, functools.partial(_frozen_forward, module), slot.context)
    return output


def _frozen_forward(module: nn.Module, x: Tensor) -> Tensor:
    slot: Slot = module.moepeft  # type: ignore[assignment]
    output: Tensor = type(module).forward(module, x) if slot.inner is None else slot.inner(x)
    return output


def _before_forward(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Root pre-hook: take the task ids out of the call, note the masks, start a new forward."""
    root, names = getattr(model, ENTRY)
    if root.runtime.begun_by is not None:  # the encoder, called by the model's own forward
        return args, kwargs
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    task_ids = kwargs.pop("task_ids", None)
    if task_ids is not None:
        task_ids = _checked_ids(root, task_ids, call)
    masks: dict[Stream, Tensor | None] = {
        "encoder": call.get("attention_mask"),
        "decoder": _decoder_mask(call),
    }
    root.runtime.begun_by = model
    root.runtime.begin(task_ids, masks, continues=_continues(call), training=model.training)
    return args, kwargs


def _after_forward(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The forward is over, however it ended. What it knew stays: checkpointing recomputes during backward."""
    runtime = getattr(model, ENTRY).root.runtime
    if runtime.begun_by is model:
        runtime.begun_by = None


def _entries(model: nn.Module) -> list[nn.Module]:
    """The modules whose calls begin a forward pass."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [model]
    encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
    return [model] if encoder is model else [model, encoder]


def _remove_hooks(module: nn.Module) -> None:
    for registered in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in registered.items() if hook in (_before_forward, _after_forward)]:
            registered.pop(key)
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
    delattr(module, ENTRY)


def _checked_ids(root: Root, task_ids: Any, call: Mapping[str, Any]) -> Tensor:
    """The ids as a tensor beside the call's inputs. Values are looked at on the CPU only: a GPU would have to wait."""
    ids = torch.as_tensor(task_ids, dtype=torch.long)
    if ids.dim() == 0:
        ids = ids.reshape(1)
    if ids.dim() > 2:
        raise MissingRouting(f"task_ids must have shape (rows,) or (rows, ids), got {tuple(ids.shape)}")
    number = getattr(root.factory, "num_tasks", None)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if number is not None and (high >= number or low < (-1 if ids.dim() == 2 else 0)):
            raise MissingRouting(
                f"task_ids lie between {low} and {high}, but {root.factory.name} was configured with num_tasks="
                f"{number}: ids count from 0 to {number - 1}"
            )
        if root.merged_task is not None and not low == high == root.merged_task:
            raise MissingRouting(
                f"task {root.merged_task} is merged into the weights, got task_ids between {low} and {high}: "
                "call unmerge() to serve other tasks"
            )
    inputs = [value for value in call.values() if isinstance(value, Tensor)]
    return ids.to(inputs[0].device) if inputs else ids


def _decoder_mask(call: Mapping[str, Any]) -> Tensor | None:
    mask = call.get("decoder_attention_mask")
    labels = call.get("labels")
    if mask is None and isinstance(labels, Tensor) and labels.dim() == 2:
        # The decoder's position i predicts label i; -100 marks the positions that pad the target.
        return labels != -100
    return mask


def _continues(call: Mapping[str, Any]) -> bool:
    if call.get("encoder_outputs") is not None:
        return True
    past = call.get("past_key_values")
    return past is not None and (not hasattr(past, "get_seq_length") or bool(past.get_seq_length() > 0))
