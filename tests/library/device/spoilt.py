"""A site with a fault, walked as `tests.library.device.walk` does: its words are FAULT FILE."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moepeft import LoRA
from tests.library.device.walk import Walk, follow
from tests.support.pretended_cuda import pretend


class Spoilt(nn.Module):
    """LoRA's adapter, and a fault that no CPU shows."""

    def __init__(self, adapter: nn.Module, fault: str) -> None:
        super().__init__()
        self.adapter, self.fault = adapter, fault

    def forward(self, x: Tensor, base: Any, ctx: Any) -> Tensor:
        output: Tensor = self.adapter(x, base, ctx)
        if self.fault == "reads a value":
            return output * (2.0 if x.sum().item() > 0 else 1.0)
        return output + torch.zeros(output.shape[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpoiltLoRA(LoRA):
    """A method of such adapters."""

    name: ClassVar[str] = "spoilt"
    fault: str = ""

    def build(self, site: Any, shared: Any) -> nn.Module:
        return Spoilt(super().build(site, shared), self.fault)


if __name__ == "__main__":
    with pretend() as device:
        found = follow(Walk("bert", SpoiltLoRA(fault=sys.argv[1])), device)
    Path(sys.argv[2]).write_text(json.dumps(found))
