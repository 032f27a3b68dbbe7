"""SMoRA: every rank of a LoRA is an expert; a token opens k of them, and a bias balances them without a loss.

Paper: Zhao et al., Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning,
arXiv 2501.15103 (KDD 2026), section 4.
Release: StyxXuan/smora, commit 7e7ada17 (Apache-2.0, a fork of peft; the method is called SRMoLE there).

    s = W_g x per token;  T = the k ranks of the largest s_j + b_j;  g = softmax of s over T, zero elsewhere
    y = W0 x + (alpha / k) B diag(k g) A x              A (r, in), B (out, r), W_g (r, in)
    after every optimiser step: b_j += u sign(mean(c) - c_j)      c_j: how many tokens opened rank j

With even gates the update is a LoRA of rank k. The bias moves the choice, not the gates.

Differences between paper and release (preset `released` reproduces those that change numbers):
* the release's scores are sigmoid(W_g x) + b, and its gates are the k largest of these over their sum: the bias is part
  of a gate: ``gates="sigmoid"``;
* it counts padding: ``tokens="all"``;
* it moves the bias at every forward, so that a layer recomputed by checkpointing moves it twice and each process keeps
  a bias of its own: not reproduced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moepeft.config import MethodConfig
from moepeft.context import SiteContext
from moepeft.methods._balanced_ranks import count_tokens, move_towards_idle
from moepeft.methods._validation import check_choices, check_count, check_dropout, check_positive
from moepeft.ops.draws import uniform
from moepeft.ops.linear import dropout_of
from moepeft.ops.precision import without_autocast
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class SMoRA(MethodConfig):
    """Configuration of SMoRA.

    Attributes:
        rank: number of ranks r, each an expert.
        top_k: ranks per token k.
        alpha: numerator of the scale alpha / k.
        gates: what a rank's gate is made of.
        tokens: which tokens are counted for the balance.
        update_rate: u, by which a rank's bias moves at an optimiser step.
        dropout: probability of dropping an input feature of the adapter while training.
    """

    name: ClassVar[str] = "smora"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "released": {"gates": "sigmoid", "tokens": "all"},
    }
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {"unbalanced": {"update_rate": 0.0}}
    sizes: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int = 64
    top_k: int = 8
    alpha: float = 16.0
    gates: Literal["softmax", "sigmoid"] = "softmax"
    tokens: Literal["real", "all"] = "real"
    update_rate: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("SMoRA", "rank", self.rank)
        check_count("SMoRA", "top_k", self.top_k, hint="top_k counts the ranks of one token")
        check_positive("SMoRA", "alpha", self.alpha)
        check_positive("SMoRA", "update_rate", self.update_rate, zero=True)
        check_choices("SMoRA", self)
        check_dropout("SMoRA", self.dropout)

    @property
    def capabilities(self) -> Capabilities:
        """Routes every token on its own, so there is no one weight to merge into."""
        return Capabilities(routing="token", not_mergeable="every token has its own ranks")

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """Two factors, the router and the bias."""
        return SMoRAAdapter(site, self)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """r (in + out) + r in per site; the bias is not trained."""
        return sum(self.rank * (2 * site.in_features + site.out_features) for site in sites)


def open_ranks(scores: Float[Tensor, "*n r"], k: int) -> Bool[Tensor, "*n r"]:
    """The k largest of each token's scores; all of them where there are no more."""
    chosen = scores.topk(min(k, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)


def softmax_gates(
    s: Float[Tensor, "*n r"], b: Float[Tensor, "r"], k: int
) -> tuple[Float[Tensor, "*n r"], Bool[Tensor, "*n r"]]:
    """g, the softmax of s over the k largest of s + b; and which these are."""
    chosen = open_ranks(s + b, k)
    return s.masked_fill(~chosen, float("-inf")).softmax(dim=-1), chosen


def sigmoid_gates(
    s: Float[Tensor, "*n r"], b: Float[Tensor, "r"], k: int
) -> tuple[Float[Tensor, "*n r"], Bool[Tensor, "*n r"]]:
    """The k largest of sigmoid(s) + b over their sum; and which these are."""
    scores = s.sigmoid() + b
    chosen = open_ranks(scores, k)
    kept = scores * chosen
    return kept / kept.sum(dim=-1, keepdim=True), chosen


class SMoRAAdapter(nn.Module):
    """The factors A (r, in) and B (out, r) of one site, its router W_g (r, in) and the bias b (r)."""

    bias: Tensor

    def __init__(self, site: LinearSite, config: SMoRA) -> None:
        super().__init__()
        self.config = config
        bound = site.in_features**-0.5
        self.A = nn.Parameter(uniform((config.rank, site.in_features), bound))
        self.B = nn.Parameter(uniform((site.out_features, config.rank), 0.0))
        self.router = nn.Parameter(uniform((config.rank, site.in_features), bound))
        self.register_buffer("bias", torch.zeros(config.rank))
        self.dropout = dropout_of(config.dropout)

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus the update of each token's k ranks."""
        y, config = base(x), self.config
        dropped = self.dropout(x)
        with without_autocast(x):
            s = F.linear(dropped.to(self.router.dtype), self.router)
            of = softmax_gates if config.gates == "softmax" else sigmoid_gates
            g, chosen = of(s, self.bias.to(s.dtype), config.top_k)
        ctx.stat("gates", g)
        if self.training and config.update_rate:
            ctx.tally(count_tokens(chosen, ctx.mask(x) if config.tokens == "real" else None))
        down = F.linear(dropped, self.A.to(x.dtype)) * g.to(x.dtype)
        # alpha / k times gates whose sum is k.
        return y + config.alpha * F.linear(down, self.B.to(x.dtype)).to(y.dtype)

    def after_step(self, counts: Float[Tensor, "r"]) -> None:
        """Move the bias by u towards the ranks that fewer tokens opened than the mean."""
        move_towards_idle(self.bias, counts, self.config.update_rate)
