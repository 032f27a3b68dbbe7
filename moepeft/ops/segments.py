"""Packed rows: the sequences that stand one after the other in a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Segments(NamedTuple):
    """The sequences of all rows, in their order.

    Attributes:
        of_token: which segment a token belongs to, the rows counted through; their number for padding.
        first: the first token of every segment.
    """

    of_token: Int[Tensor, "tokens"]
    first: Int[Tensor, "segments"]

    def means(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "segments d"]:
        """The mean of every segment."""
        number = len(self.first)
        sums = x.new_zeros(number + 1, x.shape[-1]).index_add(0, self.of_token, x)
        tokens = torch.bincount(self.of_token, minlength=number + 1).to(x.dtype)
        return sums[:number] / tokens[:number].unsqueeze(1)


def find_segments(
    position_ids: Int[Tensor, "rows positions"],
    tasks: Int[Tensor, "rows positions"],
    real: Bool[Tensor, "rows positions"] | None,
) -> Segments:
    """A segment begins with a row, where `position_ids` do not count on, where the task changes, and after padding.

    The number of segments is a value on the device, for which the host waits.
    """
    begins = torch.ones_like(tasks, dtype=torch.bool)
    begins[:, 1:] = (position_ids.diff(dim=1) != 1) | (tasks.diff(dim=1) != 0)
    if real is None:
        real = torch.ones_like(begins)
    begins[:, 1:] |= ~real[:, :-1]
    begins &= real
    flat = begins.flatten()
    first = flat.nonzero().squeeze(1)
    of_token = torch.where(real.flatten(), flat.cumsum(0) - 1, len(first))
    return Segments(of_token, first)
