"""What begins a forward: the outermost call of any part of the model that holds adapted layers.

Users call a model, its `.forward`, its backbone alone, or a getter of features that calls one tower. So every module
around adapted layers, down to the repeated blocks, answers its calls through `_entry_forward`: the outermost one begins
a `Forward` with the ids and masks of its own call, inner ones open a `Scope`. `generate` says how often it repeats the
rows. A block that runs during backward, outside of any forward, is computed again and sees what its first run saw.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .building import check_values
from .calls import Part, Scope, continues, open_scope
from .errors import GradientsLost
from .given import check_packed, checked_ids
from .held import hold, recall
from .masks import Mask
from .preparing import prepare
from .runtime import Forward, Memory, Runtime
from .siblings import note
from .sites import LinearSite
from .state import ENTRY, Entry, State, entries_of
from .stepping import check_stepped
from .unused import name_the_unused

# Their blocks take (positions, rows, features): it matters where there are as many positions as rows.
_SEQUENCE_FIRST = ("xlnet", "fsmt")


def install_entries(state: State) -> None:
    """Let the modules around adapted layers answer their calls."""
    # Inside of fused experts every matrix has a forward of its own.
    adapters = {site.name: state.slot(site).adapter for site in state.sites if site.name == site.carrier}
    for name, module in _around(state.model, state.sites).items():
        names = tuple(inspect.signature(module.forward).parameters)
        kept = {attribute: vars(module).get(attribute) for attribute in ("forward", "generate")}
        below = {site: adapter for site, adapter in adapters.items() if site.startswith(f"{name}." if name else "")}
        before = entries_of(module)
        setattr(module, ENTRY, (*before, Entry(state, names, _part(state.model, name, module), kept, below)))
        if before:
            continue
        _bind(module, "forward", _entry_forward)
        if callable(getattr(module, "generate", None)) and hasattr(module, "generation_config"):
            _bind(module, "generate", _entry_generate)


def renew_entries(state: State) -> None:
    """Let the entries know adapters that took others' places."""
    now = state.adapters
    for module in state.model.modules():
        entries = [
            entry._replace(adapters={name: now[name] for name in entry.adapters}) if entry.state is state else entry
            for entry in entries_of(module)
        ]
        if entries:
            setattr(module, ENTRY, tuple(entries))


def remove_entries(state: State) -> None:
    """Undo `install_entries`."""
    for module in state.model.modules():
        entries = entries_of(module)
        left = [entry for entry in entries if entry.state is not state]
        if len(left) == len(entries):
            continue
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is not None:
            module._gradient_checkpointing_func = _without(checkpoint, state.runtime)
        kept = entries[0].kept
        if left:
            setattr(module, ENTRY, (left[0]._replace(kept=kept), *left[1:]))
            continue
        delattr(module, ENTRY)
        for attribute, function in (("forward", _entry_forward), ("generate", _entry_generate)):
            bound = vars(module).get(attribute)
            if getattr(bound, "func", None) is function:  # else another library's wrapper stands above: it stays
                delattr(module, attribute)
                if kept[attribute] is not None:
                    setattr(module, attribute, kept[attribute])


def _bind(module: nn.Module, attribute: str, function: Callable[..., Any]) -> None:
    # A partial of a module-level function pickles; a bound method does not, nor do annotations that hold code.
    bound = functools.partial(function, module)
    signature = inspect.signature(getattr(module, attribute))
    names = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    bound.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    setattr(module, attribute, bound)


def _around(model: nn.Module, sites: tuple[LinearSite, ...]) -> dict[str, nn.Module]:
    """The modules around the sites by name: those outside of repeated blocks, and the blocks."""
    found: dict[str, nn.Module] = {}
    adapted = {site.carrier for site in sites}
    for site in sites:
        parts = site.carrier.split(".")
        inside = False
        for depth in range(len(parts)):
            name = ".".join(parts[:depth])
            module = model.get_submodule(name)
            block = depth > 0 and isinstance(model.get_submodule(".".join(parts[: depth - 1])), nn.ModuleList)
            inside = inside or block
            container = depth > 0 and isinstance(
                module, (nn.ModuleList, nn.ModuleDict)
            )  # the model itself holds the state
            if name in found or name in adapted or container:
                continue
            if (block or not inside) and not any(module is other for other in found.values()):
                found[name] = module
    return found


def _part(model: nn.Module, name: str, module: nn.Module) -> Part:
    config = getattr(model, "config", None)
    two_streams = bool(getattr(config, "is_encoder_decoder", False))
    return Part(
        module,
        stream="decoder" if two_streams and "decoder" in name.split(".") else "encoder",
        two_streams=two_streams,
        known_masks=config is not None,
        sequence_first=getattr(config, "model_type", None) in _SEQUENCE_FIRST and name.rpartition(".")[2].isdigit(),
    )


def _inner(module: nn.Module, entries: tuple[Entry, ...], attribute: str) -> Callable[..., Any]:
    kept = entries[0].kept[attribute] if entries else None
    return functools.partial(getattr(type(module), attribute), module) if kept is None else kept


def _entry_forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    entries = entries_of(module)  # none where the adapters were detached beneath another library's wrapper
    begins = any(entry.state.runtime.forward is None for entry in entries)
    task_ids = kwargs.pop("task_ids", None) if begins else None
    return _enter(module, entries, 0, task_ids, args, kwargs)


def _enter(
    module: nn.Module, entries: tuple[Entry, ...], number: int, task_ids: Any, args: tuple[Any, ...], kwargs: Any
) -> Any:
    """Call the module inside of what the forwards of its attachments know, from that number on."""
    if number == len(entries):
        return _inner(module, entries, "forward")(*args, **kwargs)
    entry = entries[number]
    inner = functools.partial(_enter, module, entries, number + 1, task_ids, args, kwargs)
    runtime = entry.state.runtime
    forward = runtime.forward
    if forward is None and backward_under_way() is not None:
        inputs = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with runtime.resumed(runtime.memory_of(inputs)):
            return inner()
    call = {**dict(zip(entry.call_names, args, strict=False)), **kwargs}
    if forward is None:
        forward = _forward_of(entry, {**call, "task_ids": task_ids}, module.training)
        runtime.begin(forward)
        try:
            prepare(entry.state, entry.adapters, forward)
            output = inner()
            hold(id(runtime), forward.values, call, output)
        finally:
            runtime.end()
        if runtime.last.grad_expected and not entry.state.uses_checked and not torch.compiler.is_compiling():
            entry.state.uses_checked = True
            name_the_unused(entry.state)
        return output
    _open(forward, entry, call)
    if torch.is_grad_enabled():
        forward.without_grad = False
    elif not forward.without_grad:  # later calls within a block have inputs that were made without autograd
        _check_gradient(forward, entry)
        forward.without_grad = True
    _remember_when_checkpointed(module, runtime)
    if forward.grad and not torch.compiler.is_compiling() and forward.scope.main is not None:
        runtime.remember(forward.scope.main)
    try:
        return inner()
    finally:
        forward.scopes.pop()


def _check_gradient(forward: Forward, entry: Entry) -> None:
    main = forward.scope.main
    if forward.grad_expected and main is not None and not torch.is_grad_enabled() and not main.requires_grad:
        raise GradientsLost(
            f"a {type(entry.part.module).__name__} runs without gradients in a training forward, so its adapters would "
            "never train: reentrant gradient checkpointing does so. Checkpoint with use_reentrant=False"
        )


def _remember_when_checkpointed(module: nn.Module, runtime: Runtime) -> None:
    """Let a block of transformers, which checkpoints inside of its own forward, be computed again as it was first."""
    checkpoint = vars(module).get("_gradient_checkpointing_func")
    if checkpoint is not None and not _remembers(checkpoint, runtime):
        bound: Any = functools.partial(_checkpoint, runtime, checkpoint)
        module._gradient_checkpointing_func = bound


def _remembers(checkpoint: Any, runtime: Runtime) -> bool:
    """Whether the runtime stands in the chain of what wraps a checkpointing function."""
    while getattr(checkpoint, "func", None) is _checkpoint:
        if checkpoint.args[0] is runtime:
            return True
        checkpoint = checkpoint.args[1]
    return False


def _without(checkpoint: Any, runtime: Runtime) -> Any:
    """The chain without that runtime."""
    if getattr(checkpoint, "func", None) is not _checkpoint:
        return checkpoint
    other, inner = checkpoint.args
    inner = _without(inner, runtime)
    return inner if other is runtime else functools.partial(_checkpoint, other, inner)


def _checkpoint(runtime: Runtime, checkpoint: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    if runtime.forward is None:  # detached
        return checkpoint(function, *args, **kwargs)
    return checkpoint(functools.partial(_again, runtime, runtime.memory(), function), *args, **kwargs)


def _again(runtime: Runtime, memory: Memory, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if runtime.forward is not None or backward_under_way() is None:
        memory.without_grad = not torch.is_grad_enabled()
        return function(*args, **kwargs)
    with runtime.resumed(memory):
        return function(*args, **kwargs)


def _open(forward: Forward, entry: Entry, call: Mapping[str, Any]) -> None:
    ids = None if forward.task_ids is None else forward.task_ids.shape[0]
    # A block after one that had positions first has them first as well, where as many rows leave it open.
    part = entry.part._replace(sequence_first=True) if forward.sequence_first else entry.part
    around, kind = forward.scope, type(part.module)
    before = None if torch.compiler.is_compiling() else forward.opened.get(kind)
    scope = None if before is None else before.again(call, around, part)
    if scope is None:
        scope = open_scope(call, around, part, ids, forward.settings.copies, forward.masks)
        noted = None if torch.compiler.is_compiling() else note(call, around, part, scope)
        if noted is not None:
            forward.opened[kind] = noted
    forward.scopes.append(scope)
    forward.sequence_first = forward.sequence_first or scope.sequence_first


def _forward_of(entry: Entry, call: Mapping[str, Any], training: bool) -> Forward:
    """What the outermost call begins."""
    state, settings = entry.state, entry.state.runtime.settings
    check_values(state)
    if state.steps and training and torch.is_grad_enabled():
        check_stepped(state)
    given = call.get("task_ids")
    if given is None and state.merged and settings.task_ids is not None:
        checked_ids(state, settings.task_ids)  # set before the merge, perhaps
    task_ids = settings.task_ids if given is None else checked_ids(state, given)
    masks: list[Mask] = []
    number = None if task_ids is None else task_ids.shape[0]
    scope = open_scope(call, None, entry.part, number, settings.copies if given is None else 1, masks)
    if task_ids is not None and scope.main is not None:
        task_ids = task_ids.to(scope.main.device)
    values, goes_on = recall(id(state.runtime), call, state.runtime.last.values, continues(call))
    values.pop("segments", None)  # of another call's rows
    if task_ids is not None and task_ids.shape[1] > 1:
        check_packed(state, task_ids, two_streams=entry.part.two_streams)
        values["position_ids"] = call.get("position_ids")
    return Forward(
        task_ids,
        [scope],
        settings,
        goes_on=goes_on,
        grad=torch.is_grad_enabled(),
        grad_expected=training and torch.is_grad_enabled(),
        values=values,
        masks=masks,
    )


def begin_at_layer(state: State, x: Tensor, training: bool) -> Forward:
    """The forward of an adapted layer that is called by itself."""
    check_values(state)
    settings = state.runtime.settings
    ids = None if settings.task_ids is None else settings.task_ids.to(x.device)
    grad = torch.is_grad_enabled()
    return Forward(ids, [Scope()], settings, grad=grad, grad_expected=grad and training)


def _entry_generate(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    entries = entries_of(module)
    generate = _inner(module, entries, "generate")
    # By its own names: the second argument is a configuration in most models, and in BLIP-2 the prompt.
    copies = _copies(module, {**dict(zip(inspect.signature(generate).parameters, args, strict=False)), **kwargs})
    with ExitStack() as inside:
        for entry in entries:
            inside.enter_context(entry.state.runtime.changed(copies=copies))
        return generate(*args, **kwargs)


def _copies(module: nn.Module, call: Mapping[str, Any]) -> int:
    """How often `generate` repeats each row, in place."""
    config = call.get("generation_config") or getattr(module, "generation_config", None)
    wanted = (call.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences"))
    return max(number or 1 for number in wanted)


def backward_under_way() -> int | None:
    """Number of the backward pass that this runs inside of, where only checkpointing calls layers."""
    if torch.compiler.is_compiling():
        return None
    number: int = torch._C._current_graph_task_id()
    return None if number == -1 else number
