"""Calls of blocks that follow each other: one call is like the one before, but for its hidden states.

What a call says of its rows is read off all its arguments, for every block anew. That takes as long as an adapted layer
does. A call that has the very arguments of the last one of the same kind of module has the same scope.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from .calls import Part, Scope, is_tower


class Opened(NamedTuple):
    """An inner call that has been opened, for those after it: blocks are called alike but for their hidden states.

    Attributes:
        main: name of the main input.
        form: shape, strides and type of the main input.
        others: all other arguments by name.
        around: the scope of the call that it is a part of.
        part: what is called.
        scope: its scope, without the main input.
    """

    main: str
    form: tuple[Any, ...]
    others: Mapping[str, Any]
    around: Scope
    part: Part
    scope: Scope

    def again(self, call: Mapping[str, Any], around: Scope, part: Part) -> Scope | None:
        """The scope of a call of a module of the same kind, if nothing that a scope depends on is different."""
        main, others = call.get(self.main), self.others
        if not isinstance(main, Tensor) or main._base is not None or not _tells_the_same(around, self.around):
            return None
        same_part = type(part.module) is type(self.part.module) and part[1:] == self.part[1:]
        if not same_part or _form(main) != self.form or len(call) != len(others) + 1:
            return None
        # The order tells which of several tensors is the main input.
        for (name, value), other in zip(call.items(), (self.main, *others), strict=True):
            if name != other or (name != self.main and value is not others[name]):
                return None
        return replace(self.scope, main=main)


def note(call: Mapping[str, Any], around: Scope, part: Part, scope: Scope) -> Opened | None:
    """What later calls are compared with; None where the main input is not simply the outer rows and positions."""
    main = scope.main
    plain = (scope.rows, scope.tokens, scope.copies) == (around.rows, around.tokens, around.copies)
    if main is None or main._base is not None or not plain or scope.sequence_first or scope.square:
        return None
    first = next(iter(call))
    if call[first] is not main or is_tower(call):
        return None
    others = {name: value for name, value in call.items() if name != first}
    return Opened(first, _form(main), others, around.past_the_call(), part, scope.past_the_call())


def _tells_the_same(one: Scope, other: Scope) -> bool:
    """Whether two scopes differ in their main input at most."""
    simple = one.rows, one.tokens, one.copies, one.sequence_first, one.square, one.learned
    if simple != (other.rows, other.tokens, other.copies, other.sequence_first, other.square, other.learned):
        return False
    return one.unknown_mask is other.unknown_mask and one.masks == other.masks


def _form(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype
