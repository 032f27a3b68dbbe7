"""Definitions and fast paths: one equation, two ways to compute it.

A definition is a plain function in the method's file. A fast path is a function of the same signature in
`moepeft.methods._fast`. `has_fast_path` ties the two together; `fast_paths` switches between them for the process.
Whoever overrides a definition in a subclass has no fast path, so that the new definition is what runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])

_enabled = True
_by_definition: frozenset[object] = frozenset()


class fast_paths:  # noqa: N801 - reads as a statement, as torch.no_grad does
    """Compute by fast paths, or by definitions.

    ``fast_paths(False)`` holds from now on. ``with fast_paths(False):`` holds inside. The switch is one for the whole
    process: backward and gradient checkpointing run in threads of their own and must see it.

    Args:
        wanted: True for fast paths, False for definitions.
        of: a definition that has a fast path, such as `moepeft.methods.ept.add_pyramid`, outside of compiled graphs;
            None: all of them.
    """

    def __init__(self, wanted: bool, of: Callable[..., Any] | None = None) -> None:
        global _enabled, _by_definition  # noqa: PLW0603
        self._before = _enabled, _by_definition
        if of is None:
            _enabled, _by_definition = wanted, frozenset() if wanted else _by_definition
        else:
            _by_definition = _by_definition - {of} if wanted else _by_definition | {of}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        global _enabled, _by_definition
        _enabled, _by_definition = self._before


def fast_paths_enabled() -> bool:
    """Whether fast paths are used at present."""
    return _enabled


def is_recorded() -> bool:
    """Whether a graph is made that other inputs will run through: no value of this input may decide what it holds."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


class WithFastPath(Protocol):
    """What `has_fast_path` makes of a definition: a function that has both forms as attributes."""

    definition: Callable[..., Any]
    fast: Callable[..., Any]


def has_fast_path(fast: Callable[..., Any], *, compiled: bool = True) -> Callable[[F], F]:
    """Decorate a definition: `fast` computes it while fast paths are enabled.

    Args:
        fast: a function of the definition's signature that gives the same values and gradients.
        compiled: whether graphs of torch.compile hold the fast path; else they hold the definition.
    """

    def decorate(definition: F) -> F:
        @functools.wraps(definition)
        def either(*args: Any, **kwargs: Any) -> Any:
            alone = compiled if torch.compiler.is_compiling() else tied not in _by_definition
            use_fast = _enabled and alone
            return (fast if use_fast else definition)(*args, **kwargs)

        tied = cast(WithFastPath, either)
        tied.definition, tied.fast = definition, fast
        return cast(F, either)

    return decorate
