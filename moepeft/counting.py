"""Count trainable numbers on the modules, by what they are for, beside the method's closed form.

Papers count differently: with or without the router, with or without the task table. So that each convention can be
named, parameters are told apart by their names: methods call a task table `task_embedding`, and what chooses experts
`gate`, `router` or `centroids`; the rest is the adapter's core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .attach import Attachment


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Trainable numbers of an attachment.

    Attributes:
        total: measured on the modules, shared parameters once.
        shared: the part of `total` that all sites own together.
        task_tables: the part of `total` that embeds tasks.
        router: the part of `total` that chooses experts.
        closed_form: what the method's formula says; a test holds the two equal for every method.
        base: frozen numbers of the model.
        sites: number of adapted layers.
    """

    total: int
    shared: int
    task_tables: int
    router: int
    closed_form: int
    base: int
    sites: int

    @property
    def core(self) -> int:
        """What is left without task tables and router: the low-rank factors, kernels and the like."""
        return self.total - self.task_tables - self.router


def group_of(name: str) -> Literal["task_table", "router", "core"]:
    """What a parameter is for, by the components of its name."""
    parts = name.split(".")
    if "task_embedding" in parts:
        return "task_table"
    return "router" if {"gate", "router", "centroids"} & set(parts) else "core"


def count_parameters(attachment: Attachment) -> ParameterCount:
    """Count an attachment's parameters. Works on the meta device: shapes are enough."""
    named = [(name, parameter.numel()) for name, parameter in attachment.named_parameters()]
    total = sum(number for _, number in named)
    everything = sum(p.numel() for p in attachment.model.parameters())
    return ParameterCount(
        total=total,
        shared=sum(number for name, number in named if name.startswith("shared.")),
        task_tables=sum(number for name, number in named if group_of(name) == "task_table"),
        router=sum(number for name, number in named if group_of(name) == "router"),
        closed_form=attachment.factory.count(attachment.sites),
        base=everything - total,
        sites=len(attachment.sites),
    )
