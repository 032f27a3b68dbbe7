"""Count trainable numbers on the modules, beside the method's closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attach import Attachment


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Trainable numbers of an attachment.

    Attributes:
        total: measured on the modules, shared parameters once.
        shared: the part of `total` that all sites own together.
        closed_form: what the method's formula says; a test holds the two equal for every method.
        base: frozen numbers of the model.
        sites: number of adapted layers.
    """

    total: int
    shared: int
    closed_form: int
    base: int
    sites: int


def count_parameters(attachment: Attachment) -> ParameterCount:
    """Count an attachment's parameters. Works on the meta device: shapes are enough."""
    shared = sum(p.numel() for n, p in attachment.named_parameters() if n.startswith("shared."))
    total = sum(p.numel() for p in attachment.parameters())
    everything = sum(p.numel() for p in attachment.model.parameters())
    return ParameterCount(
        total=total,
        shared=shared,
        closed_form=attachment.factory.count(attachment.sites),
        base=everything - total,
        sites=len(attachment.sites),
    )
