"""LoRA: one low-rank update per layer.

Paper: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, equation 3; the scale
``alpha / sqrt(r)`` from Kalajdzievski, arXiv 2312.03732 (rsLoRA).
Release: huggingface/peft; outputs and gradients equal the `peft` package's to the last bit in float64.

    y = W0 x + (alpha / r) B A x        A (r, in), B (out, r)

Differences between paper and release: A starts uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), the paper says
Gaussian. The presets `published` and `released` are the same here: peft is the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moepeft.config import MethodConfig
from moepeft.context import SiteContext
from moepeft.methods._validation import check_count, check_dropout, check_positive
from moepeft.ops.draws import uniform
from moepeft.ops.linear import add_linear, dropout_of
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class LoRA(MethodConfig):
    """Configuration of LoRA.

    Attributes:
        rank: rank r of the update.
        alpha: numerator of the scale.
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        dropout: probability of dropping an input feature of the adapter while training.
    """

    name: ClassVar[str] = "lora"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {}, "released": {}}

    rank: int = 8
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("LoRA", "rank", self.rank)
        check_positive("LoRA", "alpha", self.alpha)
        check_dropout("LoRA", self.dropout)

    @property
    def capabilities(self) -> Capabilities:
        """Mergeable, input-independent, the identity at the start."""
        return Capabilities()

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """One pair of factors."""
        return LoRAAdapter(site, self)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """r (in + out) per site."""
        return sum(self.rank * (site.in_features + site.out_features) for site in sites)


class LoRAAdapter(nn.Module):
    """The factors A (r, in) and B (out, r) of one site."""

    def __init__(self, site: LinearSite, config: LoRA) -> None:
        super().__init__()
        self.scale = config.scale
        self.A = nn.Parameter(uniform((config.rank, site.in_features), site.in_features**-0.5))
        self.B = nn.Parameter(uniform((site.out_features, config.rank), 0.0))
        self.dropout = dropout_of(config.dropout)

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus the scaled update."""
        y = base(x)
        down = F.linear(self.dropout(x), self.A.to(x.dtype))
        # In the order of the `peft` package, so that results are equal to the last bit.
        return add_linear(y, down, self.B, self.scale)

    def delta_weight(self, task: int | None) -> Float[Tensor, "o i"]:
        """(alpha / r) B A."""
        return self.scale * (self.B @ self.A)

    def lora_factors(self, task: int | None) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        """A and B."""
        return self.A, self.B
