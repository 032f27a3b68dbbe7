"""Adapted layers that a training forward does not reach."""

from __future__ import annotations

import sys
import warnings

from .state import State


def name_the_unused(state: State) -> None:
    """After the first training forward, say which adapters took no part: they are counted and get no gradient."""
    idle = [site.name for site in state.sites if not state.slot(site).has_run]
    if idle and not _is_compiled(state, idle):
        ends = sorted({name.rsplit(".", 1)[-1] for name in idle})
        warnings.warn(
            f"{len(idle)} of {len(state.sites)} adapted layers did not run in the first training forward, e.g. "
            f"{idle[0]!r}: their adapters train only where the inputs reach them, and DistributedDataParallel needs "
            f"find_unused_parameters. To leave them out: attach(exclude={ends[:6]!r})",
            stacklevel=3,
        )


def _is_compiled(state: State, idle: list[str]) -> bool:
    """Whether layers may have run compiled, which note nothing: all did, where the whole model is."""
    dynamo = sys.modules.get("torch._dynamo")
    whole = len(idle) == len(state.sites) and dynamo is not None and bool(dynamo.utils.counters["frames"])
    return whole or any(module._compiled_call_impl is not None for module in state.model.modules())
