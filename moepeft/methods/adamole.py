"""AdaMoLE: LoRA experts of which a token opens those above a threshold that it sets itself.

Paper: Liu and Luo, AdaMoLE: Fine-Tuning Large Language Models with Adaptive Mixture of Low-Rank Adaptation Experts,
arXiv 2405.00361, section 3.
Release: zefang-liu/AdaMoLE, commit 5e8599a7 (MIT).

    p = softmax(W_g x);   tau = tau_max sigmoid(v x + c)         per token; v (in), c a number; tau_max = 1 / E
    w_e = relu(p_e - tau) / sum of them
    y = W0 x + (alpha / r) sum_e w_e B_e A_e x
    balance = sum over sites of E sum_e f_e m_e     f_e: share of tokens with p_e >= tau, m_e: mean of p_e - tau

One expert at least is open: the largest p_e is no less than 1 / E, and tau lies below it.

Differences between paper and release (preset `released` reproduces those that change numbers):
* the release counts padding in the balance loss: ``tokens="all"``;
* its scripts give each of the 8 experts an eighth of the rank of 32 that a plain LoRA is trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moepeft.config import MethodConfig, Purpose, Recipe
from moepeft.context import SiteContext
from moepeft.methods._token_router import RoutedPairs
from moepeft.methods._validation import check_choices, check_count, check_dropout, check_positive
from moepeft.ops.draws import uniform
from moepeft.ops.precision import without_autocast
from moepeft.protocols import Base, Capabilities, LinearSite

_CONFIG = "configs/llama_adamole_csr_train.config"


@dataclass(frozen=True, kw_only=True)
class AdaMoLE(MethodConfig):
    """Configuration of AdaMoLE.

    Attributes:
        rank: rank r of each expert's pair.
        alpha: numerator of the scale alpha / r.
        num_experts: number of experts E.
        max_threshold: the highest threshold tau_max; None for 1 / E, above which a token could be left without expert.
        tokens: which tokens the balance loss counts.
        balance_coefficient: coefficient of the balance loss.
        dropout: probability of dropping an input feature of the adapters while training.
    """

    name: ClassVar[str] = "adamole"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "released": {"tokens": "all"},
        "released_commonsense": {"tokens": "all", "dropout": 0.05},
    }
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "commonsense": Recipe(
            preset="released_commonsense",
            sites=("q_proj", "k_proj", "v_proj", "o_proj"),
            learning_rate=1e-4,
            batch_size=16,
            epochs=2,
            warmup_steps=200,
            weight_decay=0.0,
            max_length=256,
            sources={
                **dict.fromkeys(("rank", "num_experts", "max_threshold", "balance_coefficient", "sites"), _CONFIG),
                **dict.fromkeys(("learning_rate", "batch_size", "epochs", "warmup_steps"), _CONFIG),
                **dict.fromkeys(("weight_decay", "max_length"), _CONFIG),
                **dict.fromkeys(("alpha", "dropout"), "train.py"),
            },
        )
    }
    sizes: ClassVar[tuple[str, ...]] = ("rank", "num_experts")
    purposes: ClassVar[Mapping[str, Purpose]] = {"router": "router", "slope": "router", "offset": "router"}

    rank: int = 4
    alpha: float = 16.0
    num_experts: int = 8
    max_threshold: float | None = None
    tokens: Literal["real", "all"] = "real"
    balance_coefficient: float = 0.001
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("AdaMoLE", "rank", self.rank)
        check_count("AdaMoLE", "num_experts", self.num_experts)
        check_positive("AdaMoLE", "alpha", self.alpha)
        if self.max_threshold is not None:
            check_positive("AdaMoLE", "max_threshold", self.max_threshold)
        check_positive("AdaMoLE", "balance_coefficient", self.balance_coefficient, zero=True)
        check_choices("AdaMoLE", self)
        check_dropout("AdaMoLE", self.dropout)

    @property
    def capabilities(self) -> Capabilities:
        """Routes every token on its own, so there is no one weight to merge into."""
        return Capabilities(
            routing="token",
            not_mergeable="every token has its own experts",
            aux_losses=("balance",) if self.balance_coefficient else (),
        )

    @property
    def tau_max(self) -> float:
        """The highest threshold."""
        return 1 / self.num_experts if self.max_threshold is None else self.max_threshold

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """The experts of one site, their router and the threshold."""
        return AdaMoLEAdapter(site, self)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """E (r (in + out) + in) + in + 1 per site."""
        per_expert = {site: self.rank * (site.in_features + site.out_features) + site.in_features for site in sites}
        return sum(self.num_experts * number + site.in_features + 1 for site, number in per_expert.items())

    def aux_loss(self, name: str, terms: Sequence[Tensor]) -> Tensor:
        """Coefficient times the sum over sites."""
        counts = torch.stack(list(terms))
        chosen, above, tokens = counts.unbind(dim=1)
        shares = tokens.clamp(min=1)
        return self.balance_coefficient * self.num_experts * (chosen / shares * (above / shares)).sum()


def thresholded(
    p: Float[Tensor, "*n experts"], tau: Float[Tensor, "*n 1"]
) -> tuple[Float[Tensor, "*n experts"], Float[Tensor, "*n experts"]]:
    """Each token's weights, relu(p - tau) over their sum, and p - tau; the weights of a token below tau are zero."""
    above = p - tau
    open_ = above.relu()
    total = open_.sum(dim=-1, keepdim=True)
    return open_ / torch.where(total == 0, torch.ones_like(total), total), above


class AdaMoLEAdapter(nn.Module):
    """The experts of one site; the threshold's slope v (1, in) and offset c (1)."""

    def __init__(self, site: LinearSite, config: AdaMoLE) -> None:
        super().__init__()
        self.config = config
        self.experts = RoutedPairs(site, config.num_experts, config.rank, config.alpha, config.dropout)
        bound = site.in_features**-0.5
        self.slope = nn.Parameter(uniform((1, site.in_features), bound))
        self.offset = nn.Parameter(uniform((1,), bound))

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus the experts above each token's threshold."""
        y = base(x)
        weights, above = thresholded(self.experts.probabilities(x), self.threshold(x))
        ctx.stat("gates", weights)
        if self.training and self.config.balance_coefficient:
            ctx.loss("balance", ctx.joint_sum(self.counts(above, x, ctx)))
        return self.experts.add_mixture(y, x, weights)

    def threshold(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n 1"]:
        """tau of every token."""
        with without_autocast(x):
            return self.config.tau_max * F.linear(x.to(self.slope.dtype), self.slope, self.offset).sigmoid()

    def counts(
        self, above: Float[Tensor, "rows *n experts"], x: Tensor, ctx: SiteContext
    ) -> Float[Tensor, "3 experts"]:
        """Per expert: tokens that opened it (no gradient), the sum of p - tau over tokens, the number of tokens."""
        mask = ctx.mask(x) if self.config.tokens == "real" else None
        above = above.flatten(0, -2)
        weight = torch.ones_like(above[:, :1]) if mask is None else mask.to(above.dtype).reshape(-1, 1)
        opened = ((above >= 0).to(above.dtype) * weight).sum(0).detach()
        return torch.stack((opened, (above * weight).sum(0), weight.sum().expand(self.config.num_experts)))
