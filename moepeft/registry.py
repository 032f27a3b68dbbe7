"""Names of methods. A new method is one line here, or an entry point of the group ``moepeft.methods`` from outside."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

from .config import ablations, with_tasks
from .errors import ConfigError, UnknownMethod, did_you_mean
from .protocols import AdapterFactory, FactoryClass

METHODS: dict[str, str | FactoryClass] = {
    "lora": "moepeft.methods.lora:LoRA",
    "moelora": "moepeft.methods.moelora:MOELoRA",
    "more": "moepeft.methods.more:MoRE",
    "mixlora": "moepeft.methods.mixlora:MixLoRA",
    "tucka": "moepeft.methods.tucka:TuckA",
    "ept": "moepeft.methods.ept:EPT",
    "moslora": "moepeft.methods.moslora:MoSLoRA",
    "hydralora": "moepeft.methods.hydralora:HydraLoRA",
    "mtl-lora": "moepeft.methods.mtl_lora:MTLLoRA",
    "lora-per-task": "moepeft.methods.lora_per_task:LoRAPerTask",
    "mola": "moepeft.methods.mola:MoLA",
    "loramoe": "moepeft.methods.loramoe:LoRAMoE",
    "adamole": "moepeft.methods.adamole:AdaMoLE",
    "smora": "moepeft.methods.smora:SMoRA",
    "flylora": "moepeft.methods.flylora:FlyLoRA",
    "dcft": "moepeft.methods.dcft:DCFT",
}
ENTRY_POINT_GROUP = "moepeft.methods"


def available() -> tuple[str, ...]:
    """Names of all methods, those registered from outside included."""
    return tuple(sorted({*METHODS, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))}))


def factory_class(name: str) -> FactoryClass:
    """The class registered under `name`.

    Raises:
        UnknownMethod: nothing is; suggests close names.
    """
    where = METHODS.get(name)
    if isinstance(where, str):
        module, _, attribute = where.partition(":")
        found: FactoryClass = getattr(importlib.import_module(module), attribute)
        return found
    if where is not None:
        return where
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        loaded: FactoryClass = point.load()
        return loaded
    raise UnknownMethod(f"there is no method {name!r}.{did_you_mean(name, available())}")


@contextmanager
def registered(cls: FactoryClass) -> Iterator[None]:
    """Inside, the class stands under its name, whatever else does outside: so that saved adapters of it load."""
    before = METHODS.get(cls.name)
    METHODS[cls.name] = cls
    try:
        yield
    finally:
        if before is None:
            del METHODS[cls.name]
        else:
            METHODS[cls.name] = before


def method(spec: str, *, num_tasks: int | None = None, **fields: Any) -> AdapterFactory:
    """Make a method's configuration from what one writes on a command line.

    Args:
        spec: ``name`` or ``name@preset``, e.g. ``ept@released``; the preset is ``published`` unless said, and may
            also be one of the method's `ablations`.
        num_tasks: how many tasks the rows will name; methods that know no tasks ignore it.
        **fields: hyper-parameters, over the preset's.

    Raises:
        UnknownMethod: no such method or preset.
        ConfigError: a field the method does not have, or a value out of range.
    """
    name, _, preset = spec.partition("@")
    cls = factory_class(name)
    presets = {**ablations(cls), **cls.presets}
    if (preset or "published") not in presets:
        raise UnknownMethod(f"{name!r} has no preset {preset!r}.{did_you_mean(preset, presets)}")
    factory = from_config(name, {**presets[preset or "published"], **fields})
    return factory if num_tasks is None else with_tasks(factory, num_tasks)


def from_config(name: str, values: Mapping[str, Any]) -> AdapterFactory:
    """Make a method's configuration from its fields, as JSON gives them back (lists stand for tuples)."""
    cls = factory_class(name)
    known = _fields(cls)
    for field in values:
        if field not in known:
            raise ConfigError(f"{name!r} has no hyper-parameter {field!r}.{did_you_mean(field, known)}")
    return cls(**{field: tuple(value) if isinstance(value, list) else value for field, value in values.items()})


def _fields(cls: FactoryClass) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
