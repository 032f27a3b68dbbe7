"""The checker of annotations that the tests put on every function of the library: beartype, shapes by jaxtyping."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from beartype import BeartypeConf, BeartypeHintOverrides, beartype

# jaxtyping decorates functions, not classes, so beartype cannot know the class that `Self` stands for. A whole number
# is a float, as for every type checker.
_checked: Any = beartype(conf=BeartypeConf(hint_overrides=BeartypeHintOverrides({Self: object}), is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check every call of `function`, unless it makes a configuration: those say themselves what a value should be.

    jaxtyping asks twice: for the arguments alone, and with what was returned. The second time the arguments are known.
    """
    if _makes_a_configuration(function):
        return function
    returned = function.__annotations__.get("return", Any)
    if returned is not Any:
        function.__annotations__ = {"return": returned}
    checked: Callable[..., Any] = _checked(function)
    return checked


def _makes_a_configuration(function: Callable[..., Any]) -> bool:
    if function.__name__ != "__init__" or not function.__module__.startswith("moepeft."):
        return False
    _, *fields = inspect.signature(function).parameters.values()
    return bool(fields) and all(field.kind is field.KEYWORD_ONLY for field in fields)


def modules_with_shapes() -> list[str]:
    """The modules of the library that annotate shapes. Others have nothing to check, and are called all the time."""
    library = Path(__file__).parents[2] / "moepeft"
    annotated = (path for path in sorted(library.rglob("*.py")) if "from jaxtyping import" in path.read_text())
    names = (".".join(path.relative_to(library.parent).with_suffix("").parts) for path in annotated)
    return [name.removesuffix(".__init__") for name in names]
