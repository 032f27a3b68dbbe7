"""Compile a host with adapters as one graph and compare: `python -m tests.support.compiles METHOD`."""

from __future__ import annotations

import sys

import torch
from torch import nn

import moepeft

IDS = torch.arange(4)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(self.up_proj(x).relu())
        return result


def main(spec: str) -> None:
    torch.manual_seed(0)
    host = Chain()
    adapters = moepeft.attach(host, moepeft.method(spec, num_tasks=4))
    x = torch.randn(4, 5, 16)
    host(x, task_ids=IDS)  # what looks at a first batch does so now
    for parameter in adapters.parameters():
        parameter.data.add_(0.1)
    with adapters.route(task_ids=IDS):
        expected = host(x)
        compiled = torch.compile(host, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)


if __name__ == "__main__":
    main(sys.argv[1])
