"""Every configuration of a method that takes another path through its code: presets, and options no preset has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import moepeft
from moepeft.errors import ConfigError
from moepeft.registry import factory_class


def variants(num_tasks: int) -> dict[str, moepeft.AdapterFactory]:
    """Configurations by name, each of them once: ``name@preset``, and ``name field=value`` for one option changed."""
    found: dict[Any, str] = {}
    for name in moepeft.available():
        for label, spec, fields in (*_presets(name), *_options(name)):
            try:
                factory = moepeft.method(spec, num_tasks=num_tasks, **fields)
            except ConfigError:  # the option needs another one beside it
                continue
            found.setdefault(factory, label)
    return {label: factory for factory, label in found.items()}


def _presets(name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for preset in factory_class(name).presets:
        yield f"{name}@{preset}", f"{name}@{preset}", {}


def _options(name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    cls: Any = factory_class(name)
    types = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        choices: tuple[Any, ...] = ()
        if get_origin(types[field.name]) is Literal:
            choices = get_args(types[field.name])
        elif types[field.name] is bool:
            choices = (True, False)
        elif field.name == "dropout":
            choices = (0.1,)
        elif field.name == "contrastive":
            choices = (0.0,)
        for choice in choices:
            yield f"{name} {field.name}={choice}", name, {field.name: choice}
