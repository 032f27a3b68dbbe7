"""Flags of the commands: dataclasses read by tyro, with one way to write a list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from inspect import cleandoc
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")

_REGISTRY = ConstructorRegistry()


def parse_flags(options: type[T], words: Sequence[str], command: str) -> T:
    """Read a command line.

    A field of type ``tuple[X, ...]`` is one word: its items are separated by commas, e.g. ``--seeds 0,1,2``.

    Args:
        options: dataclass whose fields are the flags and whose docstrings are the help. Its bases that are dataclasses
            are groups of the help, the last first: the name is the title, the docstring stands below the title.
        words: the command line without the program.
        command: the program, as the help shows it.

    Raises:
        SystemExit: a flag or its value is wrong (exit code 2), or help was asked for (0). The message is printed.
    """
    groups = [base for base in reversed(options.__bases__) if is_dataclass(base)]
    if not groups:
        return tyro.cli(options, args=words, prog=command, registry=_REGISTRY)
    # The types are values here: each group is a field whose flags have no prefix.
    without_prefix: Any = tyro.conf.OmitArgPrefixes
    flags = [(_title(group), without_prefix[group], field(default_factory=group)) for group in groups]
    grouped = make_dataclass(options.__name__, flags)
    said = cleandoc(options.__doc__ or "")
    found: Any = tyro.cli(grouped, args=words, prog=command, description=said, registry=_REGISTRY)
    parts = [getattr(found, _title(group)) for group in groups]
    return options(**{one.name: getattr(part, one.name) for part in parts for one in fields(part)})


def _title(group: type) -> str:
    """``WhatIsCompared`` as the help writes a name: ``what_is_compared``."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in group.__name__).lstrip("_")


@_REGISTRY.primitive_rule
def optional(flag: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """How tyro reads ``X | None``: as X. A flag that is not given is None; the word None means nothing."""
    if get_origin(flag.type) not in (Union, UnionType) or NoneType not in get_args(flag.type):
        return None
    union: Any = Union
    rest = union[tuple(one for one in get_args(flag.type) if one is not NoneType)]
    read = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(rest, flag.markers))
    assert isinstance(read, PrimitiveConstructorSpec), f"{flag.type} cannot be read from one word"
    return PrimitiveConstructorSpec(
        nargs=read.nargs,
        metavar=read.metavar,
        instance_from_str=read.instance_from_str,
        is_instance=lambda value: value is None or read.is_instance(value),
        str_from_instance=lambda value: ["unset"] if value is None else read.str_from_instance(value),
        choices=read.choices,
    )


_OUTSIDE_OF_BRACKETS = re.compile(r",(?![^\[]*\])")
"""The commas of ``lora,ept@kernels=[2,4]`` that separate items."""


@_REGISTRY.primitive_rule
def comma_list(flag: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[tuple[Any, ...]] | None:
    """How tyro reads ``tuple[X, ...]``; None for every other type, which tyro then reads by its own rules."""
    if get_origin(flag.type) is not tuple or get_args(flag.type)[1:] != (...,):
        return None
    item = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(get_args(flag.type)[0], flag.markers))
    assert isinstance(item, PrimitiveConstructorSpec), f"a list of {flag.type} cannot be read from one word"

    def read_item(word: str) -> Any:
        if item.choices is not None and word not in item.choices:
            raise ValueError(f"{word!r} is none of {', '.join(item.choices)}")
        return item.instance_from_str([word])

    def read(words: list[str]) -> tuple[Any, ...]:
        return tuple(read_item(word.strip()) for word in _OUTSIDE_OF_BRACKETS.split(words[0]) if word.strip())

    def write(items: tuple[Any, ...]) -> list[str]:
        return [",".join(word for each in items for word in item.str_from_instance(each))]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{item.metavar},...",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple) and all(map(item.is_instance, value)),
        str_from_instance=write,
    )
