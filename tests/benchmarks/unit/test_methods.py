"""Everything that makes a row has one interface: baselines, methods of this library, methods of peft."""

from __future__ import annotations

import json

import pytest

import moepeft
from benchmarks.methods.base import Method, Refused
from benchmarks.methods.baselines import BASELINES, HeadsOnly
from benchmarks.methods.parse import parse_method, parse_methods
from benchmarks.protocols.protocol import Protocol
from benchmarks.records.identity import Baseline
from moepeft.errors import Unsupported
from moepeft.sites import find_sites, select_sites
from tests.support import hosts

TASKS = 3
NAMES = (*BASELINES, "peft:lora", "peft:dora", *moepeft.available())


@pytest.fixture(params=NAMES)
def method(request: pytest.FixtureRequest) -> Method:
    return parse_method(request.param, TASKS)


def test_a_method_is_named_as_it_was_asked_for_and_a_name_gives_one_method(method: Method) -> None:
    assert method.name in NAMES
    assert parse_method(method.name, TASKS) == method


def test_its_configuration_is_what_json_gives_back(method: Method) -> None:
    assert json.loads(json.dumps(method.config())) == method.config()


def test_what_trains_is_what_is_counted(method: Method) -> None:
    backbone = hosts.bert().requires_grad_(False)
    sites = select_sites(find_sites(backbone), None)
    adapters = method.attach(backbone)
    if adapters is None:
        trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        # Heads are no part of the backbone.
        assert bool(trained) == (method.trains and not isinstance(method, HeadsOnly))
        assert method.count(sites) is None
        return
    numbers = sum(parameter.numel() for parameter in adapters.parameters())
    assert method.trains
    assert numbers == adapters.parameter_count().total
    assert method.count(sites) in (None, numbers)


def test_the_rate_is_that_of_what_trains(method: Method) -> None:
    protocol = Protocol(name="t", tasks=("a",), steps=1, learning_rate=1e-3, head_learning_rate=5e-3)
    found = method.at_rate(protocol, 2e-3)
    assert found.learning_rate == 2e-3
    assert found.head_learning_rate == (2e-3 if isinstance(method, HeadsOnly) else 5e-3)


def test_a_refused_method_keeps_its_name_and_configuration_and_says_why(method: Method) -> None:
    refused = Refused(method, "there is no such size")
    assert (refused.name, refused.config(), refused.trains) == (method.name, method.config(), False)
    with pytest.raises(Unsupported, match="there is no such size"):
        refused.check()
    method.check()


def test_the_rows_that_open_every_table_are_baselines() -> None:
    assert set(Baseline) < set(BASELINES)
    assert not any(BASELINES[name].config() for name in BASELINES)
    for has_heads, always in ((True, [Baseline.MAJORITY, Baseline.HEAD]), (False, [Baseline.MAJORITY, Baseline.BARE])):
        assert list(parse_methods((), num_tasks=TASKS, has_heads=has_heads)) == always
