"""The checker of annotations that the tests put on every function of the library: beartype, shapes by jaxtyping."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Self

from beartype import BeartypeConf, BeartypeHintOverrides, beartype

# jaxtyping decorates functions, not classes, so beartype cannot know the class that `Self` stands for. A whole number
# is a float, as for every type checker.
_checked: Any = beartype(conf=BeartypeConf(hint_overrides=BeartypeHintOverrides({Self: object}), is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check every call of `function`, unless it makes a configuration: those say themselves what a value should be."""
    checked: Callable[..., Any] = function if _makes_a_configuration(function) else _checked(function)
    return checked


def _makes_a_configuration(function: Callable[..., Any]) -> bool:
    if function.__name__ != "__init__" or not function.__module__.startswith("moepeft."):
        return False
    _, *fields = inspect.signature(function).parameters.values()
    return bool(fields) and all(field.kind is field.KEYWORD_ONLY for field in fields)
