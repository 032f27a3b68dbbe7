"""Fold updates into base weights, keeping a copy, and put the weights back bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import MissingRouting, NotMergeable
from .hooks import bind, position_readers, unbind
from .protocols import Mergeable
from .sites import LinearSite
from .state import State


def merge(state: State, task: int | None) -> None:
    """Add every site's update to its weight and keep the weights as they were; on an error nothing has changed."""
    check(state, task)
    merged = {site.name: _merged_weight(state, site, task) for site in state.sites}
    kept = {}
    for site in state.sites:
        weight = _weight(state.layer(site), site)
        kept[site.name] = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(merged[site.name])
        unbind(state.layer(site))  # the layer runs as the bare model's does, at its speed
    state.kept, state.merged_task = kept, task


def unmerge(state: State) -> None:
    """Undo `merge`."""
    if state.kept is None:
        raise NotMergeable("unmerge() without a merge(): the adapters are not merged")
    for site in state.sites:
        module = state.layer(site)
        with torch.no_grad():
            _weight(module, site).copy_(state.kept[site.name])
        bind(module)
    state.kept = state.merged_task = None


def check(state: State, task: int | None) -> None:
    """Whether the update for `task` is a fixed change of the weights, and `task` given where it must be.

    Raises:
        NotMergeable: it is not; says why.
        MissingRouting: `task` is missing, or given to a method that knows no tasks.
    """
    capabilities = state.factory.capabilities
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


def _merged_weight(state: State, site: LinearSite, task: int | None) -> Tensor:
    module = state.layer(site)
    weight = _weight(module, site)
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


def _weight(module: nn.Module, site: LinearSite) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape = (site.out_features, site.in_features)
    expected = shape[::-1] if _is_transposed(module) else shape
    if not weight.is_floating_point() or tuple(weight.shape) != expected:
        raise NotMergeable(
            f"the weight of {site.name!r} is {weight.dtype} of shape {tuple(weight.shape)}, not a floating-point "
            f"matrix of shape {expected}: quantised layers cannot take an update. Load the base unquantised to merge"
        )
    return weight


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
