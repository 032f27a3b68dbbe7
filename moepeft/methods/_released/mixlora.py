"""What the release of MixLoRA trains with."""

from __future__ import annotations

from collections.abc import Mapping

from moepeft.config import Recipe

RECIPES: Mapping[str, Recipe] = {
    "commonsense": Recipe(
        preset="released",
        sites=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        learning_rate=2e-4,
        batch_size=16,
        epochs=2,
        warmup_steps=0,
        max_length=512,
        sources=dict.fromkeys(
            (
                *("rank", "alpha", "dropout", "num_experts", "top_k", "sites"),
                *("learning_rate", "batch_size", "epochs", "warmup_steps", "max_length"),
            ),
            "TUDB-Labs/MoE-PEFT templates/mixlora.json",
        ),
    )
}
