"""What a further task costs, by the closed form, held to the modules of a model with a task more."""

from __future__ import annotations

import pytest

import moepeft
from moepeft.config import task_number
from moepeft.counting import count_added_by_task
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
