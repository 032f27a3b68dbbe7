"""The selector of MoRE's release: frozen at the first forward."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moepeft.ops.processes import has_processes


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
                self.task_map.copy_(self.gate(self.task_embedding).argmax(dim=-1))
            self._map_known = True
        return self.task_map

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._map_known = False
        super()._load_from_state_dict(*args, **kwargs)

    def term_weights(self, scale: float = 1.0) -> Float[Tensor, "tasks r"]:
        """The rung of the frozen rank."""
        weights = self.ladder.index_select(0, self.choice()).to(self.A.dtype) * (scale * self.unit)
        if has_processes():
            # Data parallelism waits for a gradient of every parameter, were it zero: tie in what nothing trains.
            idle = (self.gate.weight, self.gate.bias, self.task_embedding)
            weights = weights + 0 * sum(parameter.sum() for parameter in idle)
        return weights
