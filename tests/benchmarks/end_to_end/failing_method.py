"""A method that fails in the way it is told to, for the runner's tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from moepeft.errors import Unsupported
from moepeft.methods.lora import LoRA
from moepeft.protocols import LinearSite

ROOT = Path(__file__).resolve().parents[3]


class Outcome(nn.Module):
    """Stands for an adapter and does what its method's name says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.how = how

    def forward(self, x: Any, base: Any, ctx: Any) -> Any:
        if self.how == "diverged":
            return base(x) + self.weight * float("nan")
        if self.how == "oom":
            raise MemoryError("no room for the experts")
        if self.how == "interrupted":
            raise KeyboardInterrupt
        raise RuntimeError(f"an expert is missing in {ROOT}/somewhere")


@dataclasses.dataclass(frozen=True)
class Failing(LoRA):
    """A method that fails in the way it is told to."""

    name: ClassVar[str] = "failing"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        how: {"how": how} for how in ("published", "diverged", "oom", "unsupported", "interrupted")
    }
    how: str = "published"

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        if self.how == "unsupported":
            raise Unsupported("needs gated feed-forward networks, this model has none")
        return Outcome(self.how)

    def count(self, sites: Sequence[LinearSite]) -> int:
        return len(sites)
