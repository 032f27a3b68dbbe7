"""What is put on a model's modules: adapters around layers, hooks where a forward begins.

Every adapted layer gets one child module, `moepeft` (a `Slot` with the adapter; the first one also
holds what all share), and its `forward` is bound on the instance to a `functools.partial` of a module-level function;
the class, the layer's own parameters and their names stay as they were, so base checkpoints load as before. The model
gets a forward pre-hook that takes ``task_ids`` out of the call and reads the padding masks; so does the encoder of an
encoder-decoder model, which `generate` calls on its own. All state is reached through the modules, never through a
closure: a deep copy or a pickle of the model is independent and complete.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import task_number
from .context import SiteContext
from .errors import MissingRouting, Unsupported
from .protocols import Base, Stepping
from .reading import code_of
from .roles import Stream
from .sites import LinearSite
from .state import ENTRY, SLOT, Entry, Slot, State
from .stepping import check_stepped


def install(model: nn.Module, state: State, adapters: Sequence[nn.Module]) -> None:
    """Put one adapter around each of the state's sites, and the hooks that begin a forward."""
    for site, adapter in zip(state.sites, adapters, strict=True):
        module = model.get_submodule(site.name)
        shared = state.shared if site is state.sites[0] else None
        slot = Slot(adapter, SiteContext(state.runtime, site), module.__dict__.get("forward"), shared)
        slot.by_row = _by_row(state)
        setattr(module, SLOT, slot.to(next(module.parameters()).device).train(module.training))
        bind(module)
    state.steps = any(isinstance(adapter, Stepping) for adapter in adapters)
    if _tells_rows_apart(state):
        for attention in position_readers(model, state.sites):
            attention.register_forward_pre_hook(_note_rows, with_kwargs=True)
            attention.register_forward_hook(_forget_rows, always_call=True)
    for entry in _entries(model):
        setattr(entry, ENTRY, Entry(state, tuple(inspect.signature(entry.forward).parameters)))
        entry.register_forward_pre_hook(_before_forward, with_kwargs=True)
        entry.register_forward_hook(_after_forward, always_call=True)


def _by_row(state: State) -> bool:
    """Whether the update depends on the row as a whole, so that an input that is no row keeps the frozen layer."""
    capabilities = state.factory.capabilities
    return capabilities.routing in ("task", "batch") and not capabilities.adapts_positions


def _tells_rows_apart(state: State) -> bool:
    """Whether it matters if an input is rows of the batch: for the update, or for what is counted of tokens."""
    return _by_row(state) or state.factory.capabilities.routing == "token"


def remove(model: nn.Module) -> None:
    """Undo `install`: no module keeps anything of ours."""
    for module in model.modules():
        if isinstance(module._modules.get(SLOT), Slot):
            unbind(module)
            delattr(module, SLOT)
        _remove_hooks(module)


def bind(module: nn.Module) -> None:
    """Let the layer's adapter answer its calls."""
    # A partial of a module-level function pickles and deep-copies; a bound method does not.
    module.forward = functools.partial(_adapted_forward, module)


def unbind(module: nn.Module) -> None:
    """Give the layer its own `forward` back."""
    slot = getattr(module, SLOT)
    module.__dict__.pop("forward", None)  # merged, it runs its own already
    if slot.inner is not None:  # another library's hook (accelerate's) was bound before ours
        module.forward = slot.inner


def _adapted_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What an adapted layer computes. Its input comes first or by name; the frozen layer gets all other arguments."""
    if not args:
        args = (kwargs.pop(_input_name(module)),)
    x, *more = args
    slot: Slot = module.moepeft  # type: ignore[assignment]
    context, beside = slot.context, slot.rows is not None and all(x is not rows for rows in slot.rows)
    if not context.runtime.enabled or (beside and slot.by_row):
        return _frozen_forward(module, x, *more, **kwargs)
    if not slot.has_run and not torch.compiler.is_compiling():
        slot.has_run = True
    frozen = functools.partial(_frozen_forward, module)
    base = _with_arguments(frozen, more, kwargs) if more or kwargs else frozen
    output: Tensor = slot.adapter(x, base, context.beside_the_rows() if beside else context)
    return output


def _with_arguments(frozen: Callable[..., Tensor], more: Sequence[Any], kwargs: Mapping[str, Any]) -> Base:
    return lambda x: frozen(x, *more, **kwargs)


def _frozen_forward(module: nn.Module, x: Tensor, *more: Any, **kwargs: Any) -> Tensor:
    slot: Slot = module.moepeft  # type: ignore[assignment]
    if slot.inner is not None:
        output: Tensor = slot.inner(x, *more, **kwargs)
    else:
        output = type(module).forward(module, x, *more, **kwargs)
    return output


def _input_name(module: nn.Module) -> str:
    """The name of the first argument of the layer's own forward, e.g. ``input``."""
    _, first, *_ = inspect.signature(type(module).forward).parameters
    return first


def _before_forward(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Root pre-hook: take the task ids out of the call, note the masks, start a new forward."""
    state, names = getattr(model, ENTRY)
    if state.runtime.begun_by is not None:  # the encoder, called by the model's own forward
        return args, kwargs
    if state.without_values is not None and not next(state.without_values.parameters()).is_meta:
        raise Unsupported(
            "the adapters were attached on the meta device and to_empty() gave them memory but no values: call "
            "reset_parameters() on their attachment, then load what there is to load"
        )
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    task_ids = kwargs.pop("task_ids", None)
    if task_ids is not None:
        tensors = (value for value in call.values() if isinstance(value, Tensor))
        beside = next(tensors, None)
        task_ids = checked_ids(state, task_ids, None if beside is None else beside.device)
    masks: dict[Stream, Tensor | None] = {
        "encoder": call.get("attention_mask"),
        "decoder": _decoder_mask(call),
    }
    if state.steps and model.training and torch.is_grad_enabled():
        check_stepped(state)
    state.runtime.begun_by = model
    state.runtime.begin(task_ids, masks, continues=_continues(call), training=model.training)
    return args, kwargs


def _after_forward(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The forward that this model's call began is over."""
    state: State = getattr(model, ENTRY).state
    if state.runtime.begun_by is model:
        state.runtime.end()
        if state.runtime.grad_expected and not state.uses_checked and not torch.compiler.is_compiling():
            state.uses_checked = True
            _name_the_unused(state)


def _name_the_unused(state: State) -> None:
    """After the first training forward, say which adapters took no part: they are counted and get no gradient."""
    if any(module._compiled_call_impl is not None for module in state.model.modules()):
        return  # nothing was noted
    idle = [site.name for site in state.sites if not state.slot(site).has_run]
    if idle:
        ends = sorted({name.rsplit(".", 1)[-1] for name in idle})
        warnings.warn(
            f"{len(idle)} of {len(state.sites)} adapted layers did not run in the first training forward, e.g. "
            f"{idle[0]!r}: their adapters train only where the inputs reach them, and DistributedDataParallel needs "
            f"find_unused_parameters. To leave them out: attach(exclude={ends[:6]!r})",
            stacklevel=2,
        )


def position_readers(model: nn.Module, sites: Sequence[LinearSite]) -> list[nn.Module]:
    """Attention modules that send their table of relative positions through the same projections as the rows.

    DeBERTa v2 does. The table belongs to no row, so an update that depends on the row leaves it frozen.
    """
    parents = {site.name.rpartition(".")[0] for site in sites}
    modules = (model.get_submodule(name) for name in sorted(parents))
    shared = (module for module in modules if code_of(module).also_of_positions)
    return [module for module in shared if getattr(module, "relative_attention", False)]


def _note_rows(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the projections of this attention which inputs are rows of the batch."""
    rows = (args[0] if args else kwargs["hidden_states"], kwargs.get("query_states"))
    for child in attention.children():
        if hasattr(child, SLOT):
            child.moepeft.rows = tuple(tensor for tensor in rows if tensor is not None)  # type: ignore[union-attr]


def _forget_rows(attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    for child in attention.children():
        if hasattr(child, SLOT):
            child.moepeft.rows = None  # type: ignore[union-attr]


def _entries(model: nn.Module) -> list[nn.Module]:
    """The modules whose calls begin a forward pass."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [model]
    encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
    return [model] if encoder is model else [model, encoder]


def _remove_hooks(module: nn.Module) -> None:
    for registered in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in registered.items() if hook in _HOOKS]:
            registered.pop(key)
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
    if hasattr(module, ENTRY):
        delattr(module, ENTRY)


_HOOKS = (_before_forward, _after_forward, _note_rows, _forget_rows)


def checked_ids(state: State, task_ids: Any, device: torch.device | None) -> Tensor:
    """The ids as a tensor on `device`. Values are looked at on the CPU only: a GPU would have to wait."""
    ids = torch.as_tensor(task_ids, dtype=torch.long)
    if ids.dim() == 0:
        ids = ids.reshape(1)
    if ids.dim() > 2:
        raise MissingRouting(f"task_ids must have shape (rows,) or (rows, ids), got {tuple(ids.shape)}")
    number = task_number(state.factory)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if number is not None and (high >= number or low < (-1 if ids.dim() == 2 else 0)):
            raise MissingRouting(
                f"task_ids lie between {low} and {high}, but {state.factory.name} was configured with num_tasks="
                f"{number}: ids count from 0 to {number - 1}"
            )
        if state.merged_task is not None and not low == high == state.merged_task:
            raise MissingRouting(
                f"task {state.merged_task} is merged into the weights, got task_ids between {low} and {high}: "
                "call unmerge() to serve other tasks"
            )
    return ids if device is None else ids.to(device)


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
