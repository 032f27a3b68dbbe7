"""What adapters need and no activation decides, made for all of them at once when a forward begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .fast import fast_paths_enabled
from .ops.processes import has_processes
from .runtime import Forward
from .shards import is_sharded
from .state import State


def prepare(state: State, adapters: Mapping[str, nn.Module], forward: Forward) -> None:
    """Let the method prepare the adapters below the called module (`moepeft.protocols.Preparing`).

    Definitions and compiled graphs go site by site. So does a site whose parameters are elsewhere at this moment:
    sharded, offloaded or on another device.

    Args:
        state: of the model.
        adapters: site name -> adapter, of the sites below the called module.
        forward: the one that has begun.
    """
    # No isinstance() of `Preparing`: to look at a protocol takes longer than some methods' step takes with it.
    make: Callable[..., Sequence[Any]] | None = getattr(state.factory, "prepare", None)
    if make is None or not forward.settings.enabled or state.merged:
        return
    if not fast_paths_enabled() or torch.compiler.is_compiling():
        return
    sets = None if forward.task_ids is None or forward.packed else forward.task_ids[:, 0]
    homes = {name: _home(adapter) for name, adapter in adapters.items()}
    home = next((home for home in homes.values() if home is not None), None) if sets is None else sets.device
    names = [name for name in adapters if homes[name] is not None and homes[name] == home]
    if names:
        made = make([adapters[name] for name in names], sets)
        forward.prepared = dict(zip(names, made, strict=False))


def _home(adapter: nn.Module) -> torch.device | None:
    """Where the adapter's own parameters are; None if they have no values there at present."""
    parameter = next(iter(adapter._parameters.values()), None)
    if parameter is None or parameter.is_meta or (has_processes() and is_sharded(parameter)):
        return None
    return parameter.device
