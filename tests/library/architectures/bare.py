"""An architecture without adapters: what it gives, and which clauses can be asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import hosts, inputs

CLOSE = 1e-4  # of the largest value: some architectures have no normalisation that would keep values small


@torch.no_grad()
def run(model: nn.Module, batch: inputs.Inputs, **more: Any) -> list[Tensor]:
    """The floating tensors that a call returns."""
    return inputs.tensors(call(model, batch, **more))


def call(model: nn.Module, batch: inputs.Inputs, **more: Any) -> Any:
    """One call, without a cache where the architecture has one; ViLT draws which patches it reads."""
    torch.manual_seed(11)
    config = getattr(model.config, "text_config", model.config)
    cache = {"use_cache": False} if hasattr(config, "use_cache") and "input_ids" in batch else {}
    return model(**batch, **cache, **more)


def alone(model: nn.Module, batch: inputs.Inputs, ids: Tensor | None = None) -> list[Tensor]:
    """What the rows give one by one, stacked."""
    rows = [
        run(model, inputs.of_rows(batch, [row]), **({} if ids is None else {"task_ids": ids[[row]]}))
        for row in range(inputs.ROWS)
    ]
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are the same up to rounding."""
    if one.shape != other.shape:
        return False
    scale = other.abs().nan_to_num().max().clamp(min=1).item() if other.numel() else 1.0
    return torch.allclose(one, other, rtol=CLOSE, atol=CLOSE * scale, equal_nan=True)


@dataclass
class Bare:
    """An architecture without adapters, and which clauses can be asked of it.

    Attributes:
        rows: which of its outputs are a row's own.
        stable: of every output, the positions that padding does not touch; empty where all or nothing is touched.
        generates: whether it generates, and with a cache as without.
    """

    name: str
    kind: str
    model: nn.Module
    batch: inputs.Inputs
    output: list[Tensor] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    stable: list[Tensor] = field(default_factory=list)
    generates: bool = False
    cached: bool = False

    @classmethod
    def of(cls, name: str) -> Bare:
        """Build the architecture and try it."""
        host = hosts.HOSTS[name]
        bare = cls(name, host.kind, hosts.build(name), inputs.draw(host.kind, host.shape))
        model, batch = bare.model, bare.batch
        bare.output = run(model, batch)
        single = alone(model, batch)
        bare.rows = [index for index, value in enumerate(bare.output) if close(single[index], value)]
        if inputs.KINDS[host.kind].mask is not None:
            bare.stable = _untouched(bare.output, run(model, inputs.other_padding(host.kind, batch)))
        if inputs.KINDS[host.kind].generates:
            bare._try_to_generate()
        return bare

    def _try_to_generate(self) -> None:
        try:
            steps = [generate(self.model, self.kind, self.batch, cached=cached) for cached in (True, False)]
        except Exception:  # whatever it is, it is the architecture's own
            return
        self.generates, self.cached = True, close(*steps)

    @property
    def clauses(self) -> str:
        """The clauses that it is asked, beyond those that all are."""
        asked = {"rows": bool(self.rows), "padding": bool(self.stable), "cache": self.cached}
        return ", ".join(name for name, holds in asked.items() if holds)


def _untouched(one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    """Positions whose features agree bit for bit; nothing if padding leaves no position of its row alone."""
    same = [(a == b).flatten(min(2, a.dim() - 1)).all(-1) for a, b in zip(one, other, strict=True)]
    return same if any(bool(positions[1].any()) for positions in same if len(positions) == inputs.ROWS) else []


@torch.no_grad()
def generate(model: Any, kind: str, batch: inputs.Inputs, *, cached: bool) -> Tensor:
    """Logits of two greedy steps."""
    model.generation_config.eos_token_id = None
    steps = model.generate(
        **inputs.prompts(kind, batch), max_new_tokens=2, do_sample=False, use_cache=cached, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    return torch.stack(steps.logits)
