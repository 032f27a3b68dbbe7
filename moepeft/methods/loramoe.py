"""LoRAMoE: LoRA experts in the feed-forward networks, all open for every token, their use balanced by type of task.

Paper: Dou et al., LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin,
arXiv 2312.09979, section 3.
Release: Ablustrund/LoRAMoE, commit 11772888 (the file's header: Apache-2.0; the repository has no licence of its own).

    G = softmax(W_g x) per token
    y = W0 x + (alpha / r) sum_n G_n B_n A_n x           on every projection of a feed-forward network, one router each
    Q[m, n] = sum over the tokens of row m of G_n        the importance of expert n for row m
    I[m, n] = 1 + delta where expert n is of row m's type, else 1 - delta
    L = var(I Q) / mean(I Q) per site

Experts of one type are neighbours, as many of each type. L is smallest where I Q is constant: with delta > 0 a row then
gives experts of its own type less gate, not more. The release computes the same.

Differences between paper and release (preset `released` reproduces those that change numbers):
* the release divides the variance by the squared mean, plus 1e-10: ``dispersion="squared_mean"``;
* it counts padding in Q: ``tokens="all"``;
* it knows two types, and its script turns the loss off (weight 0). Here a type belongs to a task: ``types``. Without
  types all rows and experts are of one type, and the loss balances the experts over all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moepeft.config import MethodConfig, Recipe
from moepeft.context import SiteContext
from moepeft.errors import Unsupported
from moepeft.methods._token_router import RoutedPairs
from moepeft.methods._validation import check_choices, check_count, check_dropout, check_positive
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class LoRAMoE(MethodConfig):
    """Configuration of LoRAMoE.

    Attributes:
        rank: rank r of each expert's pair.
        alpha: numerator of the scale alpha / r.
        num_experts: number of experts N of each projection.
        types: type of every task, counted from 0; empty when all tasks are of one type.
        delta: how far the loss sets experts of a row's type apart from the others, from 0 to 1.
        dispersion: what the variance is divided by.
        tokens: which tokens count for an expert's importance.
        balance_coefficient: coefficient of the loss.
        dropout: probability of dropping an input feature of the adapters while training.
    """

    name: ClassVar[str] = "loramoe"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "released": {"dispersion": "squared_mean", "tokens": "all"},
        "released_llama": {
            "dispersion": "squared_mean",
            "tokens": "all",
            "balance_coefficient": 0.0,
            "delta": 0.0,
            "rank": 4,
            "alpha": 32.0,
            "num_experts": 8,
            "dropout": 0.05,
        },
    }
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "llama": Recipe(
            preset="released_llama",
            sites=("gate_proj", "down_proj", "up_proj"),
            learning_rate=2e-4,
            sources=dict.fromkeys(
                (
                    *("rank", "alpha", "num_experts", "dropout", "delta", "balance_coefficient"),
                    *("sites", "learning_rate"),
                ),
                "run_loramoe.sh",
            ),
        )
    }
    sizes: ClassVar[tuple[str, ...]] = ("rank", "num_experts")

    rank: int = 8
    alpha: float = 32.0
    num_experts: int = 6
    types: tuple[int, ...] = ()
    delta: float = 0.1
    dispersion: Literal["mean", "squared_mean"] = "mean"
    tokens: Literal["real", "all"] = "real"
    balance_coefficient: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("LoRAMoE", "rank", self.rank)
        for number in self.types:
            check_count("LoRAMoE", "types", number, low=0, hint="Types are counted from 0")
        low = max(self.types, default=0) + 1
        check_count("LoRAMoE", "num_experts", self.num_experts, low=low, hint="Every type needs an expert")
        check_positive("LoRAMoE", "alpha", self.alpha)
        check_positive("LoRAMoE", "delta", self.delta, zero=True)
        check_positive("LoRAMoE", "balance_coefficient", self.balance_coefficient, zero=True)
        check_choices("LoRAMoE", self)
        check_dropout("LoRAMoE", self.dropout)

    @property
    def capabilities(self) -> Capabilities:
        """Every token has its own mixture, so there is no one weight to merge into."""
        return Capabilities(
            routing="token",
            not_mergeable="every token has its own mixture of experts",
            aux_losses=("balance",) if self.balance_coefficient else (),
        )

    @property
    def num_tasks(self) -> int | None:
        """How many tasks have a type; None where types do not matter and any task may come."""
        return len(self.types) or None

    def select(self, sites: Sequence[LinearSite]) -> Sequence[LinearSite]:
        """The projections of feed-forward networks.

        Raises:
            Unsupported: there are none.
        """
        chosen = [site for site in sites if site.block is not None]
        if not chosen:
            raise Unsupported(
                "LoRAMoE adapts feed-forward networks (roles up, down and perhaps gate), and found none among its "
                "sites: choose other `sites`, or a method for any linear layer such as mola"
            )
        return chosen

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """The experts of one projection and their router."""
        return LoRAMoEAdapter(site, self)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """N (r (in + out) + in) per site."""
        per_expert = (self.rank * (site.in_features + site.out_features) + site.in_features for site in sites)
        return self.num_experts * sum(per_expert)

    def aux_loss(self, name: str, terms: Sequence[Tensor]) -> Tensor:
        """Coefficient times the mean over sites."""
        return self.balance_coefficient * torch.stack(list(terms)).mean()


def importance(
    G: Float[Tensor, "rows *n experts"], real: Float[Tensor, "rows tokens"] | None
) -> Float[Tensor, "rows experts"]:
    """Q: the sum of each row's gates over its tokens."""
    G = G.unsqueeze(1) if G.dim() == 2 else G.flatten(1, -2)
    return G.sum(dim=1) if real is None else torch.einsum("bt,btn->bn", real, G)


def same_type(types: Int[Tensor, "rows"], experts: int, number: int) -> Bool[Tensor, "rows experts"]:
    """Which experts are of each row's type; `number` types share the experts in equal parts."""
    return types.unsqueeze(-1) == torch.arange(experts, device=types.device) * number // experts


class LoRAMoEAdapter(nn.Module):
    """The experts of one projection."""

    types: Tensor

    def __init__(self, site: LinearSite, config: LoRAMoE) -> None:
        super().__init__()
        self.config = config
        self.experts = RoutedPairs(site, config.num_experts, config.rank, config.alpha, config.dropout)
        # On the model's device: made from the configuration in every step, the types would have to wait for the host.
        self.register_buffer("types", torch.tensor(config.types, dtype=torch.long), persistent=False)

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus the mixture of all experts."""
        y = base(x)
        G = self.experts.probabilities(x)
        ctx.stat("gates", G)
        if self.training and self.config.balance_coefficient:
            ctx.loss("balance", self.dispersion(G, x, ctx))
        return self.experts.add_mixture(y, x, G)

    def dispersion(self, G: Float[Tensor, "rows *n experts"], x: Tensor, ctx: SiteContext) -> Float[Tensor, ""]:
        """L: the variance of I Q over rows and experts, over their mean or its square."""
        mask = ctx.mask(x) if self.config.tokens == "real" else None
        Z = self.affinity(x.shape[0], ctx) * importance(G, None if mask is None else mask.to(G.dtype))
        number = ctx.joint_sum(torch.full((), float(Z.numel()), dtype=Z.dtype, device=Z.device))
        mean = ctx.joint_sum(Z.sum()) / number
        variance = ctx.joint_sum((Z - mean).square().sum()) / (number - 1).clamp(min=1)
        if self.config.dispersion == "mean":
            return variance / mean.clamp(min=torch.finfo(mean.dtype).tiny)
        return variance / (mean.square() + 1e-10)

    def affinity(self, rows: int, ctx: SiteContext) -> Float[Tensor, "rows experts"]:
        """I: 1 + delta for experts of the row's type, 1 - delta for others."""
        config, router = self.config, self.experts.router
        same = torch.ones((rows, config.num_experts), dtype=router.dtype, device=router.device)
        if config.types:
            same = same_type(self.types[ctx.tasks(rows)], config.num_experts, max(config.types) + 1).to(router.dtype)
        return 1 - config.delta + 2 * config.delta * same
