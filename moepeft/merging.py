"""Fold updates into base weights, keeping a copy or not, and put the weights back bit for bit.

A weight that another layer reads as well, or that is computed at every call, is refused before anything is changed
(`moepeft.ownership`).

A weight of bitsandbytes in 4 or 8 bit is read, changed and quantised again (`moepeft.weights`). A warning says what the
second rounding loses of the update.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import heads, identity
from .errors import MissingRouting, NotMergeable
from .hooks import bind, leave, unbind
from .ownership import check_weights
from .positions import position_readers
from .protocols import Mergeable
from .sites import LinearSite
from .state import State
from .trained import find_values, of_no_base
from .weights import Weight, stored_weight


def merge(state: State, task: int | None, *, keep: bool) -> None:
    """Add every site's update to its weight; on an error nothing has changed.

    Args:
        state: of the attachment.
        task: which task's update.
        keep: whether the weights as they were are kept. One merged weight is made at a time.
    """
    _warn_of_rounding(_fold(state, task, keep=keep))  # last: where warnings are errors, the merge is whole


@torch.no_grad()
def _fold(state: State, task: int | None, *, keep: bool) -> dict[str, float]:
    """`merge`; gives what quantising again lost, by site: the norm of the rounding error over that of the update."""
    check(state, task)
    for site in state.sites:
        _weight(state.layer(site), site)
    check_weights(state)
    base = identity.describe(state.model, of_no_base(state.model))
    kept: dict[str, Any] = {}
    lost: dict[str, float] = {}
    for site in () if keep else state.sites:
        _merged_weight(state, site, task)  # whatever it raises, it raises before a weight has changed
    try:
        for site in state.sites:
            weight, merged = _weight(state.layer(site), site), _merged_weight(state, site, task)
            if keep:
                kept[site.name] = weight.keep()
            size = (merged - weight.read()).norm() if weight.rounds else None
            if size == 0:
                continue  # not rounded for nothing
            weight.write(merged)
            if size is not None:
                lost[site.name] = float((weight.read() - merged).norm() / size)
    except BaseException:
        _restore({name: weight for name, weight in _changed(state).items() if name in kept}, kept)
        raise
    own, values = _heads(state), heads.values_of(state, task)
    kept |= {name: value.keep() for name, value in own.items() if keep}
    for name, value in own.items():
        value.write(values[name])
    heads.unbind(state)
    for site in state.sites:
        unbind(state.layer(site))  # the layer runs as the bare model's does, at its speed
    state.kept, state.merged_task, state.base = kept, task, base
    return lost


def merge_and_detach(state: State, task: int | None) -> None:
    """Leave the merged weights in the bare model's own modules, and nothing of ours."""
    if not state.merged:
        merge(state, task, keep=False)
    elif task not in (None, state.merged_task):
        raise NotMergeable(f"task {state.merged_task} is merged, got task={task}: call unmerge() first")
    leave(state)


@torch.no_grad()
def unmerge(state: State) -> None:
    """Undo `merge`."""
    _check_not_disabled(state, "unmerge")
    if state.kept is None:
        raise NotMergeable("unmerge() without a merge(): the adapters are not merged")
    _check_kept(state.kept)
    _restore(_changed(state), state.kept)
    for site in state.sites:
        bind(state.layer(site))
    heads.bind(state)
    state.kept = state.merged_task = state.base = None


@contextmanager
def unmerged(state: State) -> Iterator[None]:
    """Inside, the adapters are not merged; afterwards as they were, for the same task, with their new values.

    On an error, that of merging the new values included, the old values are back and merged.
    """
    if not state.merged:
        yield
        return
    task = state.merged_task
    unmerge(state)
    before = {name: value.detach().clone() for name, value in _trained(state).items()}
    try:
        yield
        _fold(state, task, keep=True)  # what is lost was said by `merge`
    except BaseException:
        with torch.no_grad():
            for name, value in _trained(state).items():
                value.copy_(before[name])
        _fold(state, task, keep=True)
        raise


def _trained(state: State) -> dict[str, Tensor]:
    """All that `Attachment.restore` may write to."""
    return {**{f"adapters.{name}": value for name, value in state.values().items()}, **find_values(state)}


@contextmanager
def bare_weights(state: State) -> Iterator[None]:
    """Inside, the weights are those before `merge`, for all threads; afterwards the merged ones, bit for bit.

    Inside, nothing can be merged or unmerged: what is put back would be of before.
    """
    kept = state.kept
    if kept is not None:
        _check_kept(kept)
    weights = {} if kept is None else _changed(state)
    merged = {name: weight.keep() for name, weight in weights.items()}
    _restore(weights, kept or {})
    inside = object()
    state.runtime.disabled.add(inside)  # a set: threads may enter and leave at once
    try:
        yield
    finally:
        state.runtime.disabled.discard(inside)
        _restore(weights, merged)


def _check_not_disabled(state: State, what: str) -> None:
    if state.runtime.disabled:
        raise NotMergeable(
            f"{what}() inside of disabled(), where the bare weights are in place: leave disabled() first"
        )


def _changed(state: State) -> dict[str, Weight]:
    """What merging writes to: a weight of every site, and the modules whose tasks have copies of their own."""
    return {**{site.name: _weight(state.layer(site), site) for site in state.sites}, **_heads(state)}


def _heads(state: State) -> dict[str, Weight]:
    return {name: Weight(value) for name, value in heads.own_values(state).items()}


def _warn_of_rounding(lost: Mapping[str, float]) -> None:
    """Say what quantising again lost, if anything was quantised."""
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        warnings.warn(
            f"merge: {len(lost)} quantised weights were rounded again after the update. At worst, in {worst!r}, the "
            f"rounding error is {lost[worst]:.2f} times the update. To lose nothing, load() the saved adapters onto "
            "the unquantised base and merge there",
            stacklevel=2,
        )


def _check_kept(kept: Mapping[str, Any]) -> None:
    if not kept:
        raise NotMergeable(
            "the adapters were merged with keep=False, so the weights of before are gone: load the base model anew, or "
            "leave with merge_and_detach()"
        )


@torch.no_grad()
def _restore(weights: Mapping[str, Weight], kept: Mapping[str, Any]) -> None:
    for name, weight in weights.items():
        weight.restore(kept[name])


def check(state: State, task: int | None) -> None:
    """Whether the update for `task` is a fixed change of the weights, and `task` given where it must be.

    Raises:
        NotMergeable: it is not; says why.
        MissingRouting: `task` is missing, or given to a method that knows no tasks.
    """
    capabilities = state.factory.capabilities
    _check_not_disabled(state, "merge")
    if state.merged:
        raise NotMergeable("the adapters are merged already: call unmerge() first")
    if capabilities.not_mergeable is not None:
        raise NotMergeable(f"{state.factory.name} cannot be merged: {capabilities.not_mergeable}")
    if capabilities.routing == "task" and position_readers(state.model, state.sites):
        raise NotMergeable(
            "the adapted projections also read a table of relative positions (DeBERTa), which a task's update leaves "
            "frozen: a merged weight would change it. Leave the query and key projections out of `sites` to merge"
        )
    by_task = capabilities.routing == "task"
    if by_task and task is None:
        raise MissingRouting(f"{state.factory.name} has one update per task: call merge(task=...)")
    if not by_task and task is not None:
        raise MissingRouting(f"{state.factory.name} has the same update for all tasks: call merge() without task")


def frozen_weight(state: State, site: LinearSite) -> Tensor:
    """The weight of an adapted layer as (out_features, in_features).

    Raises:
        NotMergeable: its numbers are not known, it is merged, or it belongs also to positions, which the update leaves
            alone.
    """
    if state.merged:
        raise NotMergeable("the adapters are merged already: call unmerge() first")
    if not state.factory.capabilities.adapts_positions and position_readers(state.model, state.sites):
        raise NotMergeable(
            "the adapted projections also read a table of relative positions (DeBERTa), which the update leaves "
            "alone: leave the query and key projections out of `sites`"
        )
    weight = _weight(state.layer(site), site).read()
    return weight.T if _is_transposed(state.layer(site)) else weight


def _merged_weight(state: State, site: LinearSite, task: int | None) -> Tensor:
    module = state.layer(site)
    weight = _weight(module, site).read()
    adapter = state.adapters[site.name]
    assert isinstance(adapter, Mergeable), f"{type(adapter).__name__} says it merges but has no delta_weight"
    with torch.no_grad():
        delta = adapter.delta_weight(task)
        if _is_transposed(module):
            delta = delta.T
        # Summed in the wider of the two types: a bf16 base must not round the update before adding it.
        wide = torch.promote_types(weight.dtype, delta.dtype)
        total = (weight.to(wide) + delta.to(wide)).to(weight.dtype)
    if not torch.isfinite(total).all():
        raise NotMergeable(f"merging {site.name!r} gives values that are not finite; the model was left as it was")
    return total


def _weight(module: nn.Module, site: LinearSite) -> Weight:
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape = (site.out_features, site.in_features)
    expected = shape[::-1] if _is_transposed(module) else shape
    stored = stored_weight(module)
    if stored is None or (not stored.rounds and tuple(weight.shape) != expected):
        raise NotMergeable(
            f"the weight of {site.name!r} is {weight.dtype} of shape {tuple(weight.shape)}, neither a floating-point "
            f"matrix of shape {expected} nor one that bitsandbytes quantised. Load the base unquantised (or call its "
            "dequantize()), load() the saved adapters onto it, and merge there"
        )
    return stored


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
