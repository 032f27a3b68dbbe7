"""Methods from the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import moepeft
from benchmarks.methods.base import Method
from benchmarks.methods.baselines import BASELINES, Bare, HeadsOnly, Majority
from benchmarks.methods.own import SUFFIX, OwnMethod, load_own_method
from benchmarks.methods.peft import SPEC_PREFIX, PeftMethod
from benchmarks.methods.registered import Moepeft
from moepeft.config import ablations
from moepeft.errors import UnknownMethod
from moepeft.protocols import AdapterFactory
from moepeft.registry import factory_class

ABLATIONS = "ablations"


def parse_methods(names: Sequence[str], *, num_tasks: int, has_heads: bool = True) -> dict[str, Method]:
    """Methods by the name they were asked for, the baselines that always run first.

    Args:
        names: with or without ``@preset`` and fields (``lora@rank=16``, ``tucka@released+routing=row``); ``all`` stands
            for every registered method, ``NAME@ablations`` for a method with everything that it declares can be left
            out or changed, ``peft:NAME`` for one of the peft package, ``path/to/file.py:Class`` for one of one's own.
        num_tasks: number of tasks of the protocol.
        has_heads: whether heads answer. Where answers are text there are none to train alone, but the bare model
            can be scored.

    Raises:
        UnknownMethod: a name is neither a baseline nor registered, or the baseline of the other kind of answer.
        ConfigError: the method cannot be configured for that many tasks.
    """
    expanded = [one for name in names for one in _expand(name)]
    ours, other = (HeadsOnly.name, Bare.name) if has_heads else (Bare.name, HeadsOnly.name)
    if other in expanded:
        reason = "its heads would be random" if has_heads else "answers are text, there are no heads"
        raise UnknownMethod(f"{other!s} means nothing for this family of models: {reason}. {ours!s} is always run.")
    methods = {name: parse_method(name, num_tasks) for name in (str(Majority.name), str(ours), *expanded)}
    # A path is no name: tables and records call a method of one's own as its class does.
    return {method.name if isinstance(method, OwnMethod) else name: method for name, method in methods.items()}


def parse_method(name: str, num_tasks: int) -> Method:
    """One method; raises what `parse_methods` raises."""
    if name in BASELINES:
        return BASELINES[name]
    if name.startswith(SPEC_PREFIX):
        return PeftMethod.parse(name, num_tasks)
    if SUFFIX in name:
        return load_own_method(name, num_tasks)
    return Moepeft(name, configure(name, num_tasks))


def configure(name: str, num_tasks: int) -> AdapterFactory:
    """The configuration of a registered method, with or without ``@preset`` and fields.

    Raises:
        UnknownMethod: the name is not registered.
        ConfigError: a field is unknown, or a value is refused.
    """
    spec, fields = _split_fields(name)
    return moepeft.method(spec, num_tasks=num_tasks, **fields)


def _split_fields(name: str) -> tuple[str, dict[str, Any]]:
    """``name@preset+field=value+...`` as ``name@preset`` and the fields; values are JSON, or plain words."""
    method, _, rest = name.partition("@")
    parts = [part for part in rest.split("+") if part]
    presets = [part for part in parts if "=" not in part]
    fields = dict(part.split("=", 1) for part in parts if "=" in part)
    return "@".join([method, *presets]), {field: _value(text) for field, text in fields.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _expand(name: str) -> tuple[str, ...]:
    if name == "all":
        return moepeft.available()
    method, _, preset = name.partition("@")
    if preset != ABLATIONS:
        return (name,)
    declared = ablations(factory_class(method))
    if not declared:
        raise UnknownMethod(f"{method!r} declares no ablations; name one of its presets instead of {ABLATIONS!r}")
    return (method, *(f"{method}@{preset}" for preset in declared))
