"""Auxiliary losses: what the sites of the last forward recorded, combined by the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .errors import AuxLossDetached
from .state import State


def aux_losses(state: State) -> dict[str, Tensor]:
    """See `moepeft.attachment.Attachment.aux_losses`."""
    return {name: _combined(state, name, terms) for name, terms in state.runtime.last.losses.items()}


def _combined(state: State, name: str, terms: Mapping[str, Any]) -> Tensor:
    """One auxiliary loss of the last forward."""
    value = state.factory.aux_loss(name, [_widened(term) for term in terms.values()])
    if state.runtime.last.grad_expected and not value.requires_grad:
        raise AuxLossDetached(
            f"the auxiliary loss {name!r} has no gradient although the model is training: reentrant gradient "
            "checkpointing drops it. Call model.gradient_checkpointing_enable("
            "gradient_checkpointing_kwargs={'use_reentrant': False})"
        )
    return value


def _widened(term: Any) -> Any:
    return term.float() if isinstance(term, Tensor) and term.dtype.itemsize < 4 else term
