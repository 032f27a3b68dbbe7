"""Small random models that a method is checked on. They need torch alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, VOCABULARY, ROWS, POSITIONS = 32, 64, 4, 7

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Host:
    """A model to put adapters on, and how to call it.

    Attributes:
        name: for messages.
        build: makes the model, bare and in eval mode, with the same weights at every call.
        inputs: keyword arguments of a call with `ROWS` rows, by seed and by the number of padding positions that
            every second row ends in.
        pad: the same inputs with so many more padding positions; None for a model without positions.
        real: which positions of the output, (rows, positions), belong to no padding.
        output: what a call returns, as one tensor whose first dimension is the rows.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    pad: Callable[[Inputs, int], Inputs] | None
    real: Callable[[Inputs], Tensor]
    output: Callable[[Any], Tensor]


class Encoder(nn.Module):
    """Two pre-norm transformer blocks whose attention hides padding."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(gated=gated) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states, (rows, positions, WIDTH)."""
        x: Tensor = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask.bool())
        return x


class Block(nn.Module):
    """Attention and a feed-forward network, with the names that LLaMA gives to its projections."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH))
        self.mlp = FeedForward(gated=gated)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """The block's output; `real` (rows, positions) is False on padding."""
        normed = self.norms[0](x)
        q, k, v = (
            self.get_submodule(f"{name}_proj")(normed).unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for name in "qkv"
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
        x = x + self.get_submodule("o_proj")(attended.transpose(1, 2).flatten(-2))
        result: Tensor = x + self.mlp(self.norms[1](x))
        return result


class FeedForward(nn.Module):
    """up, activation, down; or the gated form."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.gate_proj = nn.Linear(WIDTH, 2 * WIDTH) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as `x`."""
        inner = self.up_proj(x)
        inner = F.gelu(inner) if self.gate_proj is None else F.silu(self.gate_proj(x)) * inner
        result: Tensor = self.down_proj(inner)
        return result


def _tokens(seed: int, padded: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (ROWS, POSITIONS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, POSITIONS - padded :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _longer(inputs: Inputs, positions: int) -> Inputs:
    return {name: F.pad(value, (0, positions), value=int(name == "input_ids")) for name, value in inputs.items()}


def _encoder(*, gated: bool) -> Host:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Encoder(gated=gated).eval()

    return Host(
        name="an encoder with gated feed-forward networks" if gated else "an encoder",
        build=build,
        inputs=_tokens,
        pad=_longer,
        real=lambda inputs: inputs["attention_mask"].bool(),
        output=lambda result: result,
    )


def _vectors() -> Host:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Vectors().eval()

    def inputs(seed: int, padded: int) -> Inputs:
        return {"x": torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))}

    return Host(
        name="a network of vectors without positions",
        build=build,
        inputs=inputs,
        pad=None,
        real=lambda inputs: torch.ones(ROWS, dtype=torch.bool),
        output=lambda result: result,
    )


class Vectors(nn.Module):
    """A residual feed-forward network whose rows are vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = FeedForward(gated=False)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as `x`, (rows, WIDTH), whose type is the weights'."""
        x = x.to(self.mlp.up_proj.weight.dtype)
        result: Tensor = x + self.mlp(x)
        return result


HOSTS: tuple[Host, ...] = (_encoder(gated=False), _encoder(gated=True), _vectors())
