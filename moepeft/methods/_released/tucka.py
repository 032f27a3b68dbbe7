"""What the release of TuckA computes and trains with, setting by setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moepeft.config import Recipe

# What the release computes in all settings, and what its scripts set.
_RELEASED: Mapping[str, Any] = {"mean": "all", "choice": "normalised", "hold": False, "positions": "adapted"}
_FIELDS = ("rank", "groups", "experts", "shared_rank", "alpha", "perturbation", "sites")
_TRAINING = ("learning_rate", "batch_size", "epochs", "weight_decay")

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "released": {**_RELEASED, "perturbation": 10.0},
    "released_math": {
        **_RELEASED,
        "rank": 16,
        "groups": 4,
        "experts": 2,
        "shared_rank": 2,
        "alpha": 512.0,
        "perturbation": 20.0,
    },
    "released_image": {
        **_RELEASED,
        "rank": 2,
        "groups": 5,
        "experts": 2,
        "shared_rank": 2,
        "alpha": 1.0,
        "perturbation": 10.0,
    },
}
RECIPES: Mapping[str, Recipe] = {
    "glue": Recipe(
        preset="released",
        sites=("query_proj", "value_proj", "dense"),
        learning_rate=6e-3,
        batch_size=16,
        epochs=5,
        warmup_steps=500,
        weight_decay=0.01,
        max_length=512,
        sources=dict.fromkeys((*_FIELDS, *_TRAINING, "warmup_steps", "max_length"), "glue/train-glue.py"),
    ),
    "math": Recipe(
        preset="released_math",
        sites=("q_proj", "v_proj"),
        learning_rate=1e-3,
        batch_size=32,  # 4 processes, 1 row each, 8 accumulated; a comment of the script says 128
        epochs=2,
        weight_decay=0.0,
        max_length=512,
        sources=dict.fromkeys((*_FIELDS, *_TRAINING, "max_length"), "math/scripts/run_tucka.sh"),
    ),
    "image": Recipe(
        preset="released_image",
        sites=("query", "value", "dense"),
        learning_rate=4e-3,
        batch_size=32,
        epochs=20,
        warmup_steps=25,
        weight_decay=0.0,
        sources={
            **dict.fromkeys((*_FIELDS, *_TRAINING, "warmup_steps"), "image_cls/train-cifar.py"),
            "alpha": "peft/tuners/TuckA/config.py",
        },
    ),
}
