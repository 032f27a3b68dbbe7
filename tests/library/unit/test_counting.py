"""What a further task costs, by the closed form, held to the modules of a model with a task more."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moepeft
from moepeft.config import task_number
from moepeft.counting import count_added_by_task
from moepeft.errors import ConfigError
from moepeft.registry import METHODS
from tests.support.hosts import build


@pytest.mark.parametrize("name", METHODS)
def test_what_one_more_task_adds_is_what_the_modules_hold_more(name: str) -> None:
    fewer, more = (moepeft.attach(build("llama"), moepeft.method(name, num_tasks=tasks)) for tasks in (3, 4))
    added = count_added_by_task(fewer.factory, fewer.sites)
    assert added == more.parameter_count().total - fewer.parameter_count().total
    assert (added == 0) or task_number(fewer.factory) is not None


def test_lora_per_task_adds_a_whole_lora() -> None:
    alone = moepeft.attach(build("llama"), moepeft.method("lora"))
    apart = moepeft.attach(build("llama"), moepeft.method("lora-per-task", num_tasks=3))
    ranks = apart.factory.rank / alone.factory.rank
    assert count_added_by_task(apart.factory, apart.sites) == ranks * alone.parameter_count().total


@pytest.mark.parametrize("spec", ["lora", "moelora", "more", "ept", "mixlora", "tucka"])
def test_groups_for_optimisers_are_what_is_counted_by_purpose(spec: str) -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(16, 32), "fc2": nn.Linear(32, 16), "head": nn.Linear(16, 2)})
    adapters = moepeft.attach(model, moepeft.method(spec, num_tasks=2), train=["head"])
    optimiser = torch.optim.AdamW(adapters.parameter_groups(router={"lr": 0.5}, heads={"weight_decay": 0.25}), lr=0.125)
    groups = {group["name"]: group for group in optimiser.param_groups}
    found = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in adapters.parameters())
    sizes = {name: sum(p.numel() for p in group["params"]) for name, group in groups.items()}
    count = adapters.parameter_count()
    counted = {"experts": count.core, "router": count.router, "task_tables": count.task_tables, "heads": count.beside}
    assert sizes == {name: number for name, number in counted.items() if number}
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    expected = {"experts": (0.125, 0.01), "router": (0.5, 0.01), "task_tables": (0.125, 0.01), "heads": (0.125, 0.25)}
    assert rates == {name: expected[name] for name in groups}
    with pytest.raises(ConfigError, match="task_tables"):
        adapters.parameter_groups(routers={"lr": 1.0})
