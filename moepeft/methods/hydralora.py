"""HydraLoRA: one down-projection, several up-projections that a router mixes token by token.

Paper: Tian et al., HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning, arXiv 2404.19245, equation 5.
Release: Clin0212/HydraLoRA, commit afb693bc (the file's header: Apache-2.0; the repository has no licence of its own).

    omega = softmax(W_g x) per token                       W_g (N, in)
    y = W0 x + (alpha / r) sum_n omega_n B_n A x           A (r, in), B_n (out, r), n = 1 ... N

Differences between paper and release:
* the paper finds N by clustering the training rows (k-means, elbow rule); the release takes N as a hyper-parameter, and
  so does this file. Its script trains r = 4 on the projections of the feed-forward networks alone;
* the release draws a dropout mask of the input for each of the N products; here one mask serves all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moepeft.config import MethodConfig, Recipe
from moepeft.context import SiteContext
from moepeft.methods._token_router import probabilities
from moepeft.methods._validation import check_count, check_dropout, check_positive
from moepeft.ops.draws import uniform
from moepeft.ops.linear import dropout_of
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class HydraLoRA(MethodConfig):
    """Configuration of HydraLoRA.

    Attributes:
        rank: rank r of the down-projection and of every up-projection.
        alpha: numerator of the scale alpha / r.
        num_experts: number of up-projections N.
        dropout: probability of dropping an input feature of the adapter while training.
    """

    name: ClassVar[str] = "hydralora"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "released": {},
        "released_llama": {"rank": 4, "alpha": 32.0, "dropout": 0.05},
    }
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "llama": Recipe(
            preset="released_llama",
            sites=("gate_proj", "down_proj", "up_proj"),
            learning_rate=2e-4,
            max_length=1024,
            sources=dict.fromkeys(
                ("rank", "alpha", "dropout", "sites", "learning_rate", "max_length"), "HydraLoRA/fine-tuning.sh"
            ),
        )
    }
    sizes: ClassVar[tuple[str, ...]] = ("rank", "num_experts")

    rank: int = 8
    alpha: float = 32.0
    num_experts: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("HydraLoRA", "rank", self.rank)
        check_count("HydraLoRA", "num_experts", self.num_experts)
        check_positive("HydraLoRA", "alpha", self.alpha)
        check_dropout("HydraLoRA", self.dropout)

    @property
    def capabilities(self) -> Capabilities:
        """Every token has its own mixture, so there is no one weight to merge into."""
        return Capabilities(routing="token", not_mergeable="every token has its own mixture of up-projections")

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """One A, N B's and their router."""
        return HydraLoRAAdapter(site, self)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """r in + N r out + N in per site."""
        r, N = self.rank, self.num_experts
        return sum(r * site.in_features + N * r * site.out_features + N * site.in_features for site in sites)


def update(
    x: Float[Tensor, "*n i"],
    A: Float[Tensor, "r i"],
    B: Float[Tensor, "heads o r"],
    omega: Float[Tensor, "*n heads"],
) -> Float[Tensor, "*n o"]:
    """sum_n omega_n B_n A x."""
    down = torch.einsum("...i,ri->...r", x, A)
    return torch.einsum("...nr,nor->...o", omega.unsqueeze(-1) * down.unsqueeze(-2), B)


class HydraLoRAAdapter(nn.Module):
    """The shared A (r, in), the heads B (N, out, r) and the router W_g (N, in) of one site."""

    def __init__(self, site: LinearSite, config: HydraLoRA) -> None:
        super().__init__()
        self.scale = config.alpha / config.rank
        bound = site.in_features**-0.5
        self.A = nn.Parameter(uniform((config.rank, site.in_features), bound))
        self.B = nn.Parameter(uniform((config.num_experts, site.out_features, config.rank), 0.0))
        self.router = nn.Parameter(uniform((config.num_experts, site.in_features), bound))
        self.dropout = dropout_of(config.dropout)

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus each token's mixture of heads."""
        y = base(x)
        omega = probabilities(x, self.router)
        ctx.stat("gates", omega)
        mixed = update(self.dropout(x), self.A.to(x.dtype), self.B.to(x.dtype), omega.to(x.dtype))
        return y + self.scale * mixed.to(y.dtype)
