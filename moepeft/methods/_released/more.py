"""The selector of MoRE's release, frozen at the first forward, and what the release trains with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moepeft.config import Recipe
from moepeft.ops.processes import has_processes

RECIPES: Mapping[str, Recipe] = {
    "glue": Recipe(
        preset="released",
        sites=("q", "k", "v", "o", "wi", "wo"),
        learning_rate=3e-4,
        batch_size=64,  # 2 processes, 32 rows each
        epochs=10,  # the default: the script's --epochs 5 does not reach the sampler
        warmup_steps=500,
        weight_decay=0.01,
        max_length=128,
        sources={
            **dict.fromkeys(
                ("rank", "alpha", "sites", "learning_rate", "batch_size", "warmup_steps", "weight_decay"),
                "script/finetune_more.sh",
            ),
            "max_length": "script/finetune_more.sh",
            "dropout": "finetune.py",
            "epochs": "finetune.py",
        },
    )
}


class FrozenChoice(nn.Module):
    """Put in front of MoRE's adapter class: every task keeps the rank that the gate says at the first forward.

    Nothing trains the gate.
    """

    task_map: Tensor
    A: nn.Parameter
    gate: nn.Linear
    task_embedding: nn.Parameter
    ladder: Tensor
    unit: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("task_map", torch.full(self.task_embedding.shape[:1], -1))
        self._map_known = False

    def choice(self) -> Int[Tensor, "tasks"]:
        """The frozen map, drawn if this is the first forward."""
        if not self._map_known:
            # Only the first forward (or the first after a load) looks at values: later ones do not synchronise.
            if bool((self.task_map < 0).any()):
                chosen = self.gate(self.task_embedding).argmax(dim=-1)
                self.task_map.copy_(torch.where(self.task_map < 0, chosen, self.task_map))
            self._map_known = True
        return self.task_map

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._map_known = False
        super()._load_from_state_dict(*args, **kwargs)

    def term_weights(self) -> Float[Tensor, "tasks r"]:
        """The rung of the frozen rank."""
        weights = self.ladder.index_select(0, self.choice()).to(self.A.dtype) * self.unit
        if has_processes():
            # Data parallelism waits for a gradient of every parameter, were it zero: tie in what nothing trains.
            idle = (self.gate.weight, self.gate.bias, self.task_embedding)
            weights = weights + 0 * sum(parameter.sum() for parameter in idle)
        return weights
