"""What MOELoRA's release trains with."""

from __future__ import annotations

from collections.abc import Mapping

from moepeft.config import Recipe

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
