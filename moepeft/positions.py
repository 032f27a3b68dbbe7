"""Tables of relative positions that go through the same projections as the rows, as in DeBERTa's attention.

The attention's own inputs are rows. What else one of its projections is called with is a table, which is of no row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .reading import code_of
from .runtime import Forward
from .sites import SLOT, LinearSite
from .state import Slot


def position_readers(model: nn.Module, sites: Sequence[LinearSite]) -> list[nn.Module]:
    """Attention modules that send their table of relative positions through the same projections as the rows.

    DeBERTa v2 does. The table belongs to no row, so an update that depends on the row leaves it frozen.
    """
    parents: dict[str, set[str]] = {}
    for site in sites:
        parent, _, last = site.carrier.rpartition(".")
        parents.setdefault(parent, set()).add(last)
    modules = [(model.get_submodule(name), adapted) for name, adapted in sorted(parents.items())]
    return [
        module
        for module, adapted in modules
        if getattr(module, "relative_attention", False) and code_of(module).also_of_positions & adapted
    ]


def is_table(slot: Slot, forward: Forward, x: Tensor) -> bool:
    """Whether a projection's input is a table, and not one of the inputs that its attention noted."""
    rows = forward.tables.get(slot.parent) if forward.tables else None
    return rows is not None and all(x is not tensor for tensor in rows)


def note_rows(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the projections of this attention which inputs are rows of the batch."""
    rows = (args[0] if args else kwargs["hidden_states"], kwargs.get("query_states"))
    for forward, name in _forwards_of(attention):
        forward.tables[name] = tuple(tensor for tensor in rows if tensor is not None)


def forget_rows(attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """End what `note_rows` began."""
    for forward, name in _forwards_of(attention):
        forward.tables.pop(name, None)


def _forwards_of(attention: nn.Module) -> Iterator[tuple[Forward, str]]:
    """The forwards under way of the attachments that have adapters here."""
    slots = {id(slot.context.runtime): slot for slot in slots_below(attention)}
    for slot in slots.values():
        forward = slot.context.runtime.forward
        if forward is not None:
            yield forward, slot.parent


def add_hooks(attention: nn.Module) -> None:
    """Let the attention tell the layers below which of their inputs are rows."""
    if note_rows not in attention._forward_pre_hooks.values():
        attention.register_forward_pre_hook(note_rows, with_kwargs=True)
        attention.register_forward_hook(forget_rows, always_call=True)


def remove_hooks(module: nn.Module) -> None:
    """Undo `add_hooks`, unless a layer below is adapted still."""
    if any(True for _ in slots_below(module)):
        return
    for registered in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in registered.items() if hook in (note_rows, forget_rows)]:
            registered.pop(key)
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


def slots_below(module: nn.Module) -> Iterator[Slot]:
    """Of a module's own layers."""
    for child in module.children():
        slot = child._modules.get(SLOT)
        if isinstance(slot, Slot):
            yield slot
