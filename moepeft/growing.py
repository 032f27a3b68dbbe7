"""More tasks for adapters that are there: tables grow at their end, and every other number stays."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import building, heads
from .config import task_number, with_more_tasks
from .entries import renew_entries
from .errors import Unsupported
from .shards import is_sharded
from .state import State


@torch.no_grad()
def add_tasks(state: State, number: int) -> None:
    """See `moepeft.Attachment.add_tasks`."""
    _check(state, number)
    tasks = task_number(state.factory)
    assert tasks is not None
    grown = with_more_tasks(state.factory, tasks + number)
    if task_number(grown) != tasks + number:
        raise Unsupported(f"{grown.name} does not know its tasks by their number alone: attach it anew for more tasks")
    shared, built = building.build(grown, state.sites)
    state.runtime.take_tallies()
    if shared is not None:
        assert state.shared is not None
        _take_over(shared, state.shared)
        state.shared = state.slot(state.sites[0]).shared = shared
    for site, adapter in zip(state.sites, built, strict=True):
        slot = state.slot(site)
        assert isinstance(slot.adapter, nn.Module)
        _take_over(adapter, slot.adapter)
        slot.adapter = adapter
    renew_entries(state)
    heads.grow(state, number)
    state.factory = grown


def _check(state: State, number: int) -> None:
    name = state.factory.name
    if task_number(state.factory) is None:
        raise Unsupported(f"{name} knows no tasks, so that there are none to add: attach a method that routes by task")
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise Unsupported(f"add_tasks({number!r}): wanted a whole number from 1 on")
    if state.merged:
        raise Unsupported("the adapters are merged: call unmerge() before add_tasks()")
    if any(is_sharded(parameter) for _, parameter in state.named_parameters()):
        raise Unsupported("the adapters are sharded: add_tasks() to whole ones, save(), and shard what load() gives")
    if state.without_values is not None:
        raise Unsupported("the adapters have no values yet: call reset_parameters(), or load what there is to load")


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Give a new module what an old one of fewer tasks holds.

    A tensor of the same shape is the old one itself, so that an optimiser's state of it lives on. A longer one begins
    with the old rows.
    """
    inner = dict(old.named_modules())
    for name, module in new.named_modules():
        before = inner[name]
        for tensors, known in (
            (module._parameters, before._parameters),
            (module._buffers, before._buffers),
        ):
            for key, value in list(tensors.items()):
                kept = known[key]
                if value is not None and kept is not None:
                    tensors[key] = _grown(value, kept)
    new.train(old.training)


def _grown(value: Tensor, kept: Tensor) -> Tensor:
    if value.shape == kept.shape:
        return kept
    rows = torch.cat([kept.detach(), value.detach()[len(kept) :].to(kept)])
    return nn.Parameter(rows, requires_grad=kept.requires_grad) if isinstance(kept, nn.Parameter) else rows
