"""Linear maps and means over positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

LARGE = 1 << 16
"""Numbers of an output from which a pass over it takes longer than the views of `torch.addmm`."""

NARROW = 16
"""Rank below which a CPU takes several times as long for a product with as few columns as with as few rows."""


def computing_type(x: Tensor) -> torch.dtype:
    """The type of products with x: autocast's where it is on."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # torch refuses to answer for the meta device
        return x.dtype
    return torch.get_autocast_dtype(device)


def dropout_of(p: float) -> nn.Module:
    """Dropout with probability `p`; where nothing is dropped, a module that costs next to nothing."""
    return nn.Dropout(p) if p else nn.Identity()


def at_least_twice(table: Float[Tensor, "*n rows d"]) -> Float[Tensor, "*n _ d"]:
    """A table of one row as one of two, so that a product with it rounds as with more rows.

    Libraries multiply a single row in another way, so that the last bit would tell whether a task is alone.
    """
    return table if table.shape[-2] > 1 else table.expand(*table.shape[:-2], 2, table.shape[-1])


def per_row(weight: Tensor, x: Tensor) -> Tensor:
    """View a weight of shape (rows, n) so that it multiplies features of `x` (rows, ..., n) row by row."""
    return weight.reshape(weight.shape[0], *(1,) * (x.dim() - 2), weight.shape[-1]).to(x.dtype)


def multiply_rows(x: Float[Tensor, "rows *n k"], matrices: Float[Tensor, "rows k o"]) -> Float[Tensor, "rows *n o"]:
    """Each row of `x` times a matrix of its own."""
    positions = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
    return torch.bmm(positions, matrices).view(*x.shape[:-1], matrices.shape[-1])


def add_linear(
    y: Float[Tensor, "*n o"], x: Float[Tensor, "*m k"], weight: Float[Tensor, "o k"], scale: float | None = None
) -> Float[Tensor, "*m o"]:
    """y plus `scale` times the linear map of x, in y's type.

    With a scale, in place on what the product makes: to the last bit what sums in tensors of their own would be, which
    take longer.
    """
    if scale is None and _adds_to_a_copy(y, x, weight):
        # Of a narrow factor the library multiplies rows faster than columns, forward and backward.
        return _add_to_a_copy(y, x, weight.T.contiguous() if weight.shape[1] < NARROW else weight.T)
    update = F.linear(x, weight if weight.dtype == x.dtype else weight.to(computing_type(x)))
    if scale is not None:
        update.mul_(scale)
    return (update if update.dtype == y.dtype else update.to(y.dtype)).add_(y)


def add_product(
    y: Float[Tensor, "*n o"], x: Float[Tensor, "*n k"], matrix: Float[Tensor, "k o"]
) -> Float[Tensor, "*n o"]:
    """y plus x times the matrix, in y's type."""
    if _adds_to_a_copy(y, x, matrix):
        return _add_to_a_copy(y, x, matrix)
    return (x @ matrix).to(y.dtype).add_(y)


def _adds_to_a_copy(y: Tensor, x: Tensor, factor: Tensor) -> bool:
    """Whether a product adds to a copy of y: it saves a CPU a pass over a large output, and a GPU none."""
    large = y.numel() >= LARGE and y.device.type == "cpu" and not torch.compiler.is_compiling()
    return large and x.shape[:-1] == y.shape[:-1] and x.dtype == y.dtype == factor.dtype == computing_type(x)


def _add_to_a_copy(y: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), matrix).view(y.shape)


def token_shares(
    x: Float[Tensor, "rows *positions d"], mask: Bool[Tensor, "rows tokens"] | None
) -> Float[Tensor, "rows tokens"]:
    """Each token's weight in the mean of its row's real ones; a row of padding alone has zeros."""
    if mask is None:
        tokens = x.shape[1:-1].numel()
        return x.new_full((x.shape[0], tokens), 1 / max(1, tokens))
    weight = mask.to(x.dtype)
    # Under autocast a sum is of another type than its terms.
    return (weight / weight.sum(dim=1, keepdim=True).clamp(min=1)).to(x.dtype)


def row_mean(x: Float[Tensor, "rows *positions d"], shares: Float[Tensor, "rows tokens"]) -> Float[Tensor, "rows d"]:
    """The mean of each row over its positions, weighted by `token_shares`; a row without positions is its own mean."""
    return x if x.dim() == 2 else torch.bmm(shares.unsqueeze(1), x.flatten(1, -2)).squeeze(1)


def first_position(x: Float[Tensor, "rows *positions d"]) -> Float[Tensor, "rows d"]:
    """Each row's features at position 0."""
    return x if x.dim() == 2 else x.flatten(1, -2)[:, 0]
