"""From Python 3.12 on, isinstance() of a protocol looks members up without `nn.Module.__getattr__`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import pytest
from torch import nn
from typing_extensions import get_protocol_members, is_protocol

import moepeft
from tests.support.hosts import build


def protocols() -> list[type[Any]]:
    """All of the library that can be asked for at run time."""
    names = [
        found.name for found in pkgutil.walk_packages(moepeft.__path__, "moepeft.") if ".bridges" not in found.name
    ]
    kinds = {kind for name in names for kind in vars(importlib.import_module(name)).values() if isinstance(kind, type)}
    mine = [kind for kind in kinds if kind.__module__.startswith("moepeft") and is_protocol(kind)]
    return [kind for kind in mine if getattr(kind, "_is_runtime_protocol", False)]


PROTOCOLS = protocols()


@pytest.mark.parametrize("method", moepeft.available())
def test_what_a_protocol_asks_for_is_found_without_a_modules_own_lookup(method: str) -> None:
    assert len(PROTOCOLS) > 5
    adapters = moepeft.attach(build("llama"), moepeft.method(method, num_tasks=3))
    asked = [(each, kind) for each in adapters.adapters.values() for kind in PROTOCOLS if isinstance(each, kind)]
    assert asked
    for module, kind in asked:
        for member in get_protocol_members(kind):
            assert inspect.getattr_static(module, member, None) is not None, (method, kind.__name__, member)


def test_a_parameter_is_not() -> None:
    with pytest.raises(AttributeError):
        inspect.getattr_static(nn.Linear(2, 2), "weight")
