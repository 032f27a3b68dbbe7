"""The layout of MOELoRA's release, and what the release trains with."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from moepeft.config import Recipe
from moepeft.context import SiteContext
from moepeft.errors import MissingRouting
from moepeft.protocols import Base

RECIPES: Mapping[str, Recipe] = {
    "medical": Recipe(
        preset="released",
        sites=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        learning_rate=2e-4,
        batch_size=64,  # 4 processes, 4 rows each, 4 accumulated
        max_length=1024,
        sources={
            **dict.fromkeys(
                ("rank", "num_experts", "dropout", "sites", "learning_rate", "batch_size", "max_length"),
                "experiments/moelora.bash",
            ),
            **dict.fromkeys(("alpha", "num_tasks", "task_dim"), "src/MLoRA/arguments.py"),
        },
    )
}


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
