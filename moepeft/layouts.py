"""How a layer's input holds the rows of its call, and the same input as (rows, ..., features).

A layer gets its scope's rows in one of these forms, which `arrange` brings to (rows, positions, features):
(rows, ..., features); (positions, rows, features), as sequence-first models have it; all tokens in one dimension; and
(parts of rows, positions, features), where windows cut a row. All other forms stay as they are, and a method that
must know the rows refuses them. So does it refuse what two forms explain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .calls import Scope, looks_transposed
from .errors import MissingRouting


class Place(NamedTuple):
    """Where a layer stands, as far as its input depends on it.

    Attributes:
        regrouped: in an expert's own module, which gets a choice of tokens.
        nested: in a list of modules inside of its block, each of which may get a choice of tokens.
        streams: how many copies of all rows stand one after the other, where a method made them.
    """

    regrouped: bool = False
    nested: bool = False
    streams: int = 1


class Arranged(NamedTuple):
    """A layer's input as (rows, ..., features).

    Attributes:
        x: the input.
        restore: brings an output of that form back to the layer's own.
        in_order: whether the positions of a row are in their order.
        rows_known: whether dimension 0 is known to be the rows.
        positions: how many positions of each row stand in `x` as rows of their own; None where rows are whole.
        transposed: whether the layer's own form is (positions, rows, features).
    """

    x: Tensor
    restore: Callable[[Tensor], Tensor]
    in_order: bool = True
    rows_known: bool = True
    positions: int | None = None
    transposed: bool = False

    def by_position(self) -> Arranged:
        """The same with every position as a row of its own: (rows * positions, features)."""
        shape = self.x.shape[:-1]
        return self._replace(
            x=self.x.flatten(0, -2),
            restore=lambda y: self.restore(y.reshape(*shape, -1)),
            positions=shape[1:].numel(),
        )


def same(y: Tensor) -> Tensor:
    """The tensor itself."""
    return y


def rows_from_second(x: Tensor) -> Arranged:
    """An input (positions, rows, features) of a method whose layout says so.

    Raises:
        MissingRouting: the input has no two dimensions beside the features.
    """
    if x.dim() != 3:
        raise MissingRouting(f"layout='sequence_first' needs an input of 3 dimensions, got shape {tuple(x.shape)}")
    return Arranged(x.transpose(0, 1), lambda y: y.transpose(0, 1))


def arrange(x: Tensor, scope: Scope, place: Place, *, transposed_before: bool, beside_transposed: bool) -> Arranged:
    """Bring a layer's input to (rows, ..., features) where its form is known.

    Args:
        x: the input.
        scope: of the call that runs.
        place: where the layer stands.
        transposed_before: the layer has got (positions, rows, features) before.
        beside_transposed: another layer of the same module has got (positions, rows, features) in this forward, as
            Longformer's query before its `query_global`, which gets fewer positions.
    """
    if scope.rows is None or x.dim() < 2 or place.regrouped:
        return Arranged(x, same, rows_known=not place.regrouped)
    rows, tokens = scope.rows * place.streams, scope.tokens
    if x.dim() == 2:
        return _arrange_flat(x, rows, tokens, place.nested, scope.sequence_first)
    second = x.shape[1] == rows
    transposed = second and (scope.sequence_first or transposed_before)
    if x.shape[0] == rows and not transposed:
        doubtful = second and rows > 1 and (scope.square or beside_transposed or looks_transposed(x))
        return Arranged(x, same, rows_known=not doubtful)
    parts = x.shape[0] // rows
    windows = parts * rows == x.shape[0] and tokens is not None and parts * x.shape[1:-1].numel() == tokens
    transposed = transposed or (second and beside_transposed)
    few = tokens is None and x.shape[0] % rows
    positions_first = second and (transposed or x.shape[0] == tokens or few)
    if positions_first and windows and not transposed and not looks_transposed(x):
        windows = positions_first = False  # windows of as many positions as there are rows, or positions first
    if positions_first:
        return Arranged(x.transpose(0, 1), lambda y: y.transpose(0, 1).contiguous(), transposed=True)
    if windows:
        cut = x.reshape(rows, parts, *x.shape[1:])
        return Arranged(cut, lambda y: y.flatten(0, 1), in_order=False)
    return Arranged(x, same, rows_known=False)


def _arrange_flat(x: Tensor, rows: int, tokens: int | None, nested: bool, sequence_first: bool) -> Arranged:
    """Of two dimensions: one vector per row, or all tokens; in a list inside of a block perhaps a choice of tokens."""
    chosen = nested and tokens not in (None, 1)
    if x.shape[0] == rows and not chosen:
        return Arranged(x, same)
    if chosen or tokens is None or x.shape[0] != rows * tokens:
        return Arranged(x, same, rows_known=False)
    if sequence_first:
        split = x.reshape(tokens, rows, -1).transpose(0, 1)
        return Arranged(split, lambda y: y.transpose(0, 1).reshape(-1, y.shape[-1]))
    return Arranged(x.reshape(rows, tokens, -1), lambda y: y.flatten(0, 1))
