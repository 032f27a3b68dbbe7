"""Checks of a method's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moepeft.errors import ConfigError


def check_count(method: str, field: str, value: Any, *, low: int = 1, high: int | None = None, hint: str = "") -> None:
    """`value` must be a whole number in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        allowed = f"a whole number from {low}" + (f" to {high}" if high is not None else " on")
        raise ConfigError(f"{method}: {field}={value!r}, wanted {allowed}. {hint}".rstrip())


def check_positive(method: str, field: str, value: Any, *, zero: bool = False) -> None:
    """`value` must be a finite number above zero, or not below it."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 <= value < float("inf")) or (value == 0 and not zero):
        bound = "at least 0" if zero else "above 0"
        raise ConfigError(f"{method}: {field}={value!r}, wanted a finite number {bound}")


def check_dropout(method: str, value: Any) -> None:
    """A dropout probability lies in [0, 1)."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"{method}: dropout={value!r}, wanted a probability from 0 to below 1")


def check_choice(method: str, field: str, value: Any, allowed: Sequence[str]) -> None:
    """`value` must be one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{method}: {field}={value!r}, wanted one of {', '.join(map(repr, allowed))}")


def check_choices(method: str, config: Any) -> None:
    """Every field of a configuration that is declared as a `Literal` must be one of its values."""
    for field, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            check_choice(method, field, getattr(config, field), get_args(hint))
