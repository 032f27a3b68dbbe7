"""FlyLoRA: a frozen sparse down-projection is the router; a token opens the k ranks in which it is largest.

Paper: Zou et al., FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise
Mixture-of-Experts, arXiv 2510.08396 (NeurIPS 2025), section 3.
Release: gfyddha/FlyLoRA, commit 91d9e367 (its fork of peft: Apache-2.0; `flylora.py` has no licence: read, not run).

    h = A x                       A (r, in), frozen: each row has in k / r entries from N(0, 1/r^2), the others are 0
    T = the k ranks of the largest |h_j + d_j|
    y = W0 x + (alpha / r) sum over j in T of b_j h_j               B (out, r) with columns b_j: all that trains
    after every optimiser step: d_j += u sign(mean(c) - c_j)        c_j: how many tokens opened rank j

Differences between paper and release (preset `released` reproduces those that change numbers):
* the scripts train the fork of peft, which chooses by h + d, not by its magnitude: ``choice="value"``;
* the fork computes h without gradient, so that none reaches the layer's input through the adapter:
  ``input_gradient=False``;
* the fork counts padding: ``tokens="all"``;
* the fork moves d at every forward, evaluation included; `flylora.py` has `update_bias`, which nothing calls: not
  reproduced, d moves at every optimiser step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moepeft.config import MethodConfig, Recipe
from moepeft.context import SiteContext
from moepeft.methods._balanced_ranks import count_tokens, move_towards_idle
from moepeft.methods._validation import check_choices, check_count, check_dropout, check_positive
from moepeft.ops.draws import normal, uniform
from moepeft.ops.linear import dropout_of
from moepeft.protocols import Base, Capabilities, LinearSite

_SCRIPT = "scripts/run_mmlu.sh"


@dataclass(frozen=True, kw_only=True)
class FlyLoRA(MethodConfig):
    """Configuration of FlyLoRA.

    Attributes:
        rank: number of ranks r, each an expert.
        top_k: ranks per token k; k / r is also the share of A that is not zero.
        alpha: numerator of the scale alpha / r.
        choice: a token opens the ranks of the largest magnitude, or of the largest value.
        input_gradient: whether gradients reach the layer's input through the adapter.
        tokens: which tokens are counted for the balance.
        update_rate: u, by which a rank's bias moves at an optimiser step.
        dropout: probability of dropping an input feature of the adapter while training.
    """

    name: ClassVar[str] = "flylora"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "released": {"choice": "value", "input_gradient": False, "tokens": "all"},
    }
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {"unbalanced": {"update_rate": 0.0}}
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "mmlu": Recipe(
            preset="released",
            sites=("q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "up_proj"),
            learning_rate=3e-4,
            batch_size=128,
            epochs=1,
            max_length=128,
            sources={
                **dict.fromkeys(("rank", "top_k", "alpha", "update_rate", "dropout", "sites"), _SCRIPT),
                **dict.fromkeys(("learning_rate", "batch_size", "epochs", "max_length"), _SCRIPT),
            },
        )
    }
    sizes: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int = 32
    top_k: int = 8
    alpha: float = 64.0
    choice: Literal["magnitude", "value"] = "magnitude"
    input_gradient: bool = True
    tokens: Literal["real", "all"] = "real"
    update_rate: float = 0.001
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("FlyLoRA", "rank", self.rank)
        check_count("FlyLoRA", "top_k", self.top_k, hint="top_k counts the ranks of one token")
        check_positive("FlyLoRA", "alpha", self.alpha)
        check_positive("FlyLoRA", "update_rate", self.update_rate, zero=True)
        check_choices("FlyLoRA", self)
        check_dropout("FlyLoRA", self.dropout)

    @property
    def capabilities(self) -> Capabilities:
        """Routes every token on its own, so there is no one weight to merge into."""
        return Capabilities(routing="token", not_mergeable="every token has its own ranks")

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """The frozen A, the bias, and B."""
        return FlyLoRAAdapter(site, self)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """r out per site: A and the bias are not trained."""
        return sum(self.rank * site.out_features for site in sites)


def sparse_projection(rank: int, width: int, top_k: int) -> Float[Tensor, "r i"]:
    """Rows of normal draws with standard deviation 1 / r, of which a share k / r stays, in random places."""
    kept = max(1, width * min(top_k, rank) // rank)
    places = torch.rand(rank, width).topk(kept, dim=-1).indices
    return normal((rank, width), 1 / rank) * torch.zeros(rank, width).scatter(-1, places, 1.0)


def open_ranks(h: Float[Tensor, "*n r"], d: Float[Tensor, "r"], k: int, choice: str) -> Bool[Tensor, "*n r"]:
    """Each token's k ranks of the largest |h + d|, or h + d; all of them where there are no more."""
    scores = (h + d).abs() if choice == "magnitude" else h + d
    chosen = scores.topk(min(k, h.shape[-1]), dim=-1).indices
    return torch.zeros_like(h, dtype=torch.bool).scatter(-1, chosen, True)


class FlyLoRAAdapter(nn.Module):
    """The frozen A (r, in) and bias d (r) of one site, and the factor B (out, r) that trains."""

    A: Tensor
    bias: Tensor

    def __init__(self, site: LinearSite, config: FlyLoRA) -> None:
        super().__init__()
        self.config = config
        self.scale = config.alpha / config.rank
        self.register_buffer("A", sparse_projection(config.rank, site.in_features, config.top_k))
        self.register_buffer("bias", torch.zeros(config.rank))
        self.B = nn.Parameter(uniform((site.out_features, config.rank), 0.0))
        self.dropout = dropout_of(config.dropout)

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus the update of each token's k ranks."""
        y, config = base(x), self.config
        h = F.linear(self.dropout(x), self.A.to(x.dtype))
        h = h if config.input_gradient else h.detach()
        chosen = open_ranks(h, self.bias.to(h.dtype), config.top_k, config.choice)
        ctx.stat("gates", lambda: chosen.to(h.dtype))
        if self.training and config.update_rate:
            ctx.tally(count_tokens(chosen, ctx.mask(x) if config.tokens == "real" else None))
        return y + self.scale * F.linear(h * chosen, self.B.to(x.dtype)).to(y.dtype)

    def after_step(self, counts: Float[Tensor, "r"]) -> None:
        """Move the bias by u towards the ranks that fewer tokens opened than the mean."""
        move_towards_idle(self.bias, counts, self.config.update_rate)
