"""Flags of the commands: dataclasses read by tyro, with one way to write a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")

_REGISTRY = ConstructorRegistry()


def parse_flags(options: type[T], words: Sequence[str], command: str) -> T:
    """Read a command line.

    A field of type ``tuple[X, ...]`` is one word: its items are separated by commas, e.g. ``--seeds 0,1,2``.

    Args:
        options: dataclass whose fields are the flags and whose docstrings are the help.
        words: the command line without the program.
        command: the program, as the help shows it.

    Raises:
        SystemExit: a flag or its value is wrong (exit code 2), or help was asked for (0). The message is printed.
    """
    return tyro.cli(options, args=words, prog=command, registry=_REGISTRY)


@_REGISTRY.primitive_rule
def comma_list(field: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[tuple[Any, ...]] | None:
    """How tyro reads ``tuple[X, ...]``; None for every other type, which tyro then reads by its own rules."""
    if get_origin(field.type) is not tuple or get_args(field.type)[1:] != (...,):
        return None
    item = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(get_args(field.type)[0], field.markers))
    assert isinstance(item, PrimitiveConstructorSpec), f"a list of {field.type} cannot be read from one word"

    def read_item(word: str) -> Any:
        if item.choices is not None and word not in item.choices:
            raise ValueError(f"{word!r} is none of {', '.join(item.choices)}")
        return item.instance_from_str([word])

    def read(words: list[str]) -> tuple[Any, ...]:
        return tuple(read_item(word.strip()) for word in words[0].split(",") if word.strip())

    def write(items: tuple[Any, ...]) -> list[str]:
        return [",".join(word for each in items for word in item.str_from_instance(each))]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{item.metavar},...",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple) and all(map(item.is_instance, value)),
        str_from_instance=write,
    )
