"""The layout of MOELoRA's release."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from moepeft.context import SiteContext
from moepeft.errors import MissingRouting
from moepeft.protocols import Base


class SequenceFirst(nn.Module):
    """Put in front of an adapter class: the same for a model whose rows are dimension 1 of the input, as in ChatGLM."""

    def forward(self, x: Float[Tensor, "n rows i"], base: Base, ctx: SiteContext) -> Float[Tensor, "n rows o"]:
        """The frozen layer's output plus the experts' weighted sum, rows first in between."""
        if x.dim() != 3:
            raise MissingRouting(f"layout='sequence_first' needs an input of 3 dimensions, got shape {tuple(x.shape)}")
        rows_first: Tensor = super().forward(
            x.transpose(0, 1), lambda rows: base(rows.transpose(0, 1)).transpose(0, 1), ctx
        )
        return rows_first.transpose(0, 1)
