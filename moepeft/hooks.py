"""What is put on a model's layers: adapters, and on the modules around them what begins a forward.

Every adapted layer gets one child module, `moepeft` (a `Slot` with the adapter; the first one also holds what all
share), and its `forward` is bound on the instance to a `functools.partial` of a module-level function; the class, the
layer's own parameters and their names stay as they were, so base checkpoints load as before. `moepeft.entries` says
what is put on the modules around them. All state is reached through the modules, never through a closure: a deep copy
or a pickle of the model is independent and complete.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import heads
from .context import SiteContext
from .entries import backward_under_way, begin_at_layer, install_entries, remove_entries
from .fused import ExpertMatrices, ExpertMatrix, mix, project
from .layouts import Arranged, arrange, rows_from_second
from .positions import add_hooks, is_table, position_readers, remove_hooks
from .protocols import Base, Stepping
from .runtime import Forward, Runtime
from .sites import SLOT, LinearSite
from .state import Slot, State, states_of, weight_of
from .trained import is_beneath


def install(state: State, adapters: Sequence[nn.Module]) -> None:
    """Put one adapter around each of the state's sites, and on the modules around them what begins a forward."""
    for site, adapter in zip(state.sites, adapters, strict=True):
        module = _place(state.model, site)
        shared = state.shared if site is state.sites[0] else None
        slot = Slot(adapter, SiteContext(state.runtime, site), module.__dict__.get("forward"), shared, state)
        slot.by_row = _by_row(state)
        slot.by_task = state.factory.capabilities.routing == "task"
        setattr(module, SLOT, slot.to(weight_of(module).device).train(module.training))
        bind(module)
    state.steps = any(isinstance(adapter, Stepping) for adapter in adapters)
    if _tells_rows_apart(state):
        for attention in position_readers(state.model, state.sites):
            add_hooks(attention)
    _compute_rows_whole(state)
    heads.install(state)
    install_entries(state)


def _place(model: nn.Module, site: LinearSite) -> nn.Module:
    """The module that gets a site's adapter: the layer, or what is made to stand for an expert's matrix."""
    layer = model.get_submodule(site.carrier)
    if site.fused is None:
        return layer
    if SLOT not in layer._modules:
        layer.add_module(SLOT, ExpertMatrices(layer.__dict__.get("forward")))
    matrices = layer._modules[SLOT]
    assert isinstance(matrices, ExpertMatrices)
    return matrices.place(layer, site.fused)


def _by_row(state: State) -> bool:
    """Whether the update depends on the row as a whole, so that an input that is no row keeps the frozen layer."""
    capabilities = state.factory.capabilities
    return capabilities.routing in ("task", "batch") and not capabilities.adapts_positions


def _tells_rows_apart(state: State) -> bool:
    """Whether it matters if an input is rows of the batch: for the update, or for what is counted of tokens."""
    return _by_row(state) or state.factory.capabilities.routing == "token"


def remove(state: State) -> None:
    """Undo `install`: no module keeps anything of this attachment."""
    remove_entries(state)
    heads.remove(state)
    for module in state.model.modules():
        if _owner_of(module._modules.get(SLOT)) is state:
            unbind(module)
            delattr(module, SLOT)
    for module in state.model.modules():
        remove_hooks(module)
    for name, size in state.chunk_sizes.items():
        still = [other for other in states_of(state.model) if _has_sites_below(other, name)]
        if still:
            still[0].chunk_sizes[name] = size
        else:
            state.model.get_submodule(name).chunk_size_feed_forward = size  # type: ignore[assignment]


def _owner_of(carried: nn.Module | None) -> State | None:
    """Whose adapters a layer or a module of experts carries."""
    if isinstance(carried, ExpertMatrices):
        carried = next(carried.matrices())._modules.get(SLOT)
    return carried.state if isinstance(carried, Slot) else None


def leave(state: State) -> None:
    """Undo `install`, and let train what trained in the bare model. What came after attach() stays, as a new head.

    While other attachments are there, the bare model stays frozen, and so does what this one trained beside itself.
    """
    own = state.train
    remove(state)
    others = states_of(state.model)
    for name, parameter in state.model.named_parameters():
        if others:
            if is_beneath(name, own):
                parameter.requires_grad_(False)
        elif name in state.trained_before:
            parameter.requires_grad_(state.trained_before[name])


def _compute_rows_whole(state: State) -> None:
    """Let no feed-forward network be computed in chunks of positions, which belong to no row as a whole.

    Chunks save memory and change no output; `detach` brings them back.
    """
    for name, module in state.model.named_modules():
        size = getattr(module, "chunk_size_feed_forward", 0)
        if size and _has_sites_below(state, name):
            state.chunk_sizes[name] = size
            module.chunk_size_feed_forward = 0


def _has_sites_below(state: State, name: str) -> bool:
    return any(site.name.startswith(f"{name}." if name else "") for site in state.sites)


def bind(module: nn.Module) -> None:
    """Let the layer's adapter answer its calls."""
    # A partial of a module-level function pickles and deep-copies; a bound method does not.
    if isinstance(module, ExpertMatrix):
        module.experts.forward = functools.partial(_adapted_experts, module.experts)
    else:
        module.forward = functools.partial(_adapted_forward, module)


def unbind(module: nn.Module) -> None:
    """Give the layer its own `forward` back."""
    module = module.experts if isinstance(module, ExpertMatrix) else module
    slot = getattr(module, SLOT)
    if getattr(vars(module).get("forward"), "func", None) in (_adapted_forward, _adapted_experts):
        del module.forward
        if slot.inner is not None:  # another library's hook (accelerate's) was bound before ours
            module.forward = slot.inner


def _adapted_forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Tensor:
    """What an adapted layer computes. Its input comes first or by name; the frozen layer gets all other arguments."""
    if not args:
        args = (kwargs.pop(_input_name(module)),)
    x, *more = args
    # From the dictionaries: a module's own way to its children takes ten times as long, here for every layer.
    slot: Slot = module._modules[SLOT]  # type: ignore[assignment]
    adapter: nn.Module = slot._modules["adapter"]  # type: ignore[assignment]
    forward = slot.context.runtime.forward
    if forward is None:
        return _without_forward(functools.partial(_adapted_forward, module), slot, x, more, kwargs)
    beside = is_table(slot, forward, x)
    if not forward.settings.enabled or (beside and slot.by_row):
        return _frozen_forward(module, x, *more, **kwargs)
    if not slot.has_run and not torch.compiler.is_compiling():
        slot.has_run = True
    frozen: Base = slot.inner or functools.partial(type(module).forward, module)
    if more or kwargs:
        frozen = _with_arguments(frozen, more, kwargs)
    if beside:
        forward.input = forward.given = None
        output: Tensor = adapter(x, frozen, slot.context.beside_the_rows())
        return output
    arranged = forward.input
    if forward.given is not x or arranged is None or arranged.positions is not None:  # positions may be copies
        arranged = forward.input = _arranged(x, slot, forward)
        forward.given = x
    assert arranged is not None
    return arranged.restore(adapter(arranged.x, frozen, slot.context))


def _arranged(x: Tensor, slot: Slot, forward: Forward) -> Arranged:
    if slot.rows_second:
        arranged = rows_from_second(x)
    else:
        beside = slot.parent in forward.transposed
        arranged = arrange(x, forward.scope, slot.place, transposed_before=slot.is_transposed, beside_transposed=beside)
        if arranged.transposed and not beside:
            forward.transposed.add(slot.parent)
        if arranged.transposed and not torch.compiler.is_compiling():
            slot.is_transposed = True
    # Elsewhere the rows stay whole: what a token-routed method counts of them is laid out by rows.
    by_position = slot.by_task and forward.packed and arranged.rows_known and arranged.in_order and arranged.x.dim() > 2
    return arranged.by_position() if by_position else arranged


def _without_forward(
    adapted: Callable[..., Tensor], slot: Slot, x: Tensor, more: Sequence[Any], kwargs: dict[str, Any]
) -> Tensor:
    """A layer that is called by itself, or computed again by checkpointing of a smaller part than a block."""
    runtime: Runtime = slot.context.runtime
    backward = backward_under_way()
    if backward is not None:
        with runtime.resumed_at(x, backward):
            return adapted(x, *more, **kwargs)
    runtime.begin(begin_at_layer(slot.state, x, slot.training))
    try:
        return adapted(x, *more, **kwargs)
    finally:
        runtime.end()


def _with_arguments(frozen: Callable[..., Tensor], more: Sequence[Any], kwargs: Mapping[str, Any]) -> Base:
    return lambda x: frozen(x, *more, **kwargs)


def _frozen_forward(module: nn.Module, x: Tensor, *more: Any, **kwargs: Any) -> Tensor:
    slot: Slot = module._modules[SLOT]  # type: ignore[assignment]
    if slot.inner is not None:
        output: Tensor = slot.inner(x, *more, **kwargs)
    else:
        output = type(module).forward(module, x, *more, **kwargs)
    return output


def _input_name(module: nn.Module) -> str:
    """The name of the first argument of the layer's own forward, e.g. ``input``."""
    _, first, *_ = inspect.signature(type(module).forward).parameters
    return first


# ---------------------------------------------------------------------- experts


def _adapted_experts(module: nn.Module, /, *args: Any, **kwargs: Any) -> Tensor:
    """What a module of fused experts computes: each expert's adapters see the tokens that the router sent there."""
    matrices: ExpertMatrices = module.moepeft  # type: ignore[assignment]
    slot: Slot = next(matrices.matrices()).moepeft  # type: ignore[assignment]
    forward = slot.context.runtime.forward
    x, *more = _in_order(module, args, kwargs) if kwargs else args
    if forward is None:
        return _without_forward(functools.partial(_adapted_experts, module), slot, x, more, {})
    if not forward.settings.enabled:
        inner = matrices.inner or functools.partial(type(module).forward, module)
        return inner(x, *more)
    tasks = _tasks_of_tokens(x, slot, forward)
    for matrix in matrices.matrices():  # an expert without tokens is no layer that the model does not use
        matrix.moepeft.has_run = True  # type: ignore[union-attr]
    inside = Runtime()

    def adapted(parameter: str, index: int, inputs: Tensor, tokens: Tensor) -> Tensor:
        matrix = matrices.find(parameter, index)
        if matrix is None:
            return project(module, parameter, index, inputs)
        own: Slot = matrix.moepeft  # type: ignore[assignment]
        inside.begin(forward.beside(None if tasks is None else tasks[tokens].unsqueeze(1)))
        output: Tensor = own.adapter(
            inputs, functools.partial(project, module, parameter, index), SiteContext(inside, own.context.site)
        )
        return output

    return mix(module, adapted, x, *more)


def _in_order(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs).args[1:]


def _tasks_of_tokens(x: Tensor, slot: Slot, forward: Forward) -> Tensor | None:
    """Tasks of all tokens, (tokens, ids), in the order of the experts' input; None where nothing routes by them."""
    if not slot.by_task:
        return None
    arranged = forward.input = _arranged(x, slot, forward)
    forward.given = x
    sets = slot.context.task_sets(arranged.x.shape[0])
    shape = arranged.x.shape[:-1]
    return arranged.restore(sets.view(shape[0], *(1,) * (len(shape) - 1), -1).expand(*shape, -1))
