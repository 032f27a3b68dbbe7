"""LoRA that does harm to the process it trains in, as its preset and the environment say."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from moepeft.methods.lora import LoRA, LoRAAdapter
from moepeft.protocols import LinearSite

KILL_AT = "HOSTILE_KILL_AT_FILE"
"""Environment: the number of the file, counted from the build on, in whose writing the process is killed."""


class HostileAdapter(LoRAAdapter):
    """Fails in its third training forward."""

    def __init__(self, site: LinearSite, config: Hostile) -> None:
        super().__init__(site, config)
        self.how = config.how
        self.calls = 0

    def forward(self, x: Any, base: Any, ctx: Any) -> Any:
        y = super().forward(x, base, ctx)
        self.calls += self.training
        if self.calls < 3 or not self.training:
            return y
        if self.how == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return y * float("nan") if self.how == "nan" else y


@dataclasses.dataclass(frozen=True)
class Hostile(LoRA):
    """A method that does harm."""

    name: ClassVar[str] = "hostile"
    presets: ClassVar[dict[str, dict[str, Any]]] = {how: {"how": how} for how in ("published", "oom", "nan")}
    how: str = "published"

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        return HostileAdapter(site, self)

    def select(self, sites: Sequence[LinearSite]) -> Sequence[LinearSite]:
        if os.environ.get(KILL_AT):
            _die_at(int(os.environ[KILL_AT]))
        return sites


def _die_at(number: int) -> None:
    """From here on the process gets SIGKILL when it has written, and not yet renamed, its file of that number."""
    real, written = os.fsync, []

    def fsync(file: int) -> None:
        real(file)
        written.append(file)
        if len(written) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync
