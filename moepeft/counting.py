"""Count trainable numbers on the modules, by what they are for, beside the method's closed form.

Papers count differently: with or without the router, with or without the task table. So that each convention can be
named, parameters are told apart by purpose (`moepeft.config.purpose`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .config import purpose, task_number, with_tasks
from .protocols import AdapterFactory, LinearSite
from .sites import by_reason
from .state import State
from .trained import find_others, owners


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Trainable numbers of an state.

    Attributes:
        total: measured on the modules, shared parameters once.
        shared: the part of `total` that all sites own together.
        task_tables: the part of `total` that embeds tasks.
        router: the part of `total` that chooses experts.
        beside: numbers of the model that train beside the adapters, such as a new head's; no part of `total`.
        closed_form: what the method's formula says; a test holds the two equal for every method.
        base: frozen numbers of the model.
        sites: number of adapted layers.
        experts: the part of `total` in the adapters of fused experts.
    """

    total: int
    shared: int
    task_tables: int
    router: int
    beside: int
    closed_form: int
    base: int
    sites: int
    experts: int = 0

    @property
    def core(self) -> int:
        """What is left without task tables and router: the low-rank factors, kernels and the like."""
        return self.total - self.task_tables - self.router


def count_parameters(state: State) -> ParameterCount:
    """Count the adapters' parameters. Works on the meta device: shapes are enough."""
    counted: Counter[str] = Counter()
    of_experts = {f"sites.{site.name}" for site in state.sites if site.fused is not None}
    for module_name, module in state.modules():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                counted[purpose(state.factory, name)] += parameter.numel()
                counted["shared"] += parameter.numel() * (module_name == "shared")
                counted["experts"] += parameter.numel() * (module_name in of_experts)
    total = counted["task_table"] + counted["router"] + counted["core"]
    beside = sum(parameter.numel() for parameter in find_others(state).values())
    everything = sum(p.numel() for p in state.model.parameters())
    of_others = sum(_added_by(other) for other in state.neighbours)
    return ParameterCount(
        total=total,
        shared=counted["shared"],
        task_tables=counted["task_table"],
        router=counted["router"],
        beside=beside,
        closed_form=state.factory.count(state.sites),
        base=everything - total - beside - of_others,
        sites=len(state.sites),
        experts=counted["experts"],
    )


def _added_by(state: State) -> int:
    """Numbers that the bare model does not have: adapters, and heads per task."""
    heads = (value.numel() for name, value in find_others(state).items() if name not in state.trained_before)
    return sum(heads) + sum(parameter.numel() for _, parameter in state.named_parameters())


def count_added_by_task(factory: AdapterFactory, sites: Sequence[LinearSite]) -> int:
    """Trainable numbers that one more task adds, by the method's closed form; 0 of a method that knows no tasks."""
    tasks = task_number(factory)
    return 0 if tasks is None else with_tasks(factory, tasks + 1).count(sites) - factory.count(sites)


def summarise(state: State) -> str:
    """See `moepeft.attachment.Attachment.summary`."""
    roles = {site.role: 0 for site in state.sites}
    for site in state.sites:
        roles[site.role] += 1
    count = count_parameters(state)
    share = count.total / max(count.base, 1)
    return (
        f"{state.factory}\n"
        f"{len(state.sites)} sites: {', '.join(f'{role} x {number}' for role, number in roles.items())}\n"
        f"{count.total:,} trainable parameters, {count.shared:,} of them shared by all sites; "
        f"{share:.2%} of {count.base:,} frozen ones"
        + (f"\n{count.experts:,} of them, {count.experts / count.total:.0%}, in experts" if count.experts else "")
        + (f"\n{count.beside:,} more train beside: {', '.join(owners(state))}" if count.beside else "")
        + "".join(f"\nleft out: {line}" for line in by_reason(state.left_out))
    )
