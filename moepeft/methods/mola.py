"""MoLA: a mixture of LoRA experts at every linear layer, more experts in higher layers.

Paper: Gao et al., Higher Layers Need More LoRA Experts, arXiv 2402.08562, section 3.
Releases: GCYZSL/MoLA, commit 01785c84 (without a licence: read, not run); TUDB-Labs/MoE-PEFT, commit 40f8cb74
(Apache-2.0), whose layer computes the same.

    p = softmax(W x) per token;  the k largest entries over their sum are the weights w_e, the others are 0
    y = W0 x + (alpha / r) sum_e w_e B_e A_e x            e = 1 ... E_l, the number of experts of layer l
    balance = sum over sites of E_l sum_e f_e m_e         f_e: share of the choices, m_e: mean of p_e over tokens

The allocation (2, 4, 6, 8) gives the lowest quarter of the layers 2 experts and the highest 8: the paper's MoLA-V,
which it finds best; its other shapes are ablations. The encoder and the decoder of one model count their layers apart.

Differences between paper and release (preset `released` reproduces those that change numbers):
* the release counts padding in the balance loss: ``tokens="all"``;
* its script for instruction tuning turns the loss on with coefficient 0.001, the one for ScienceQA turns it off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moepeft.config import MethodConfig, Recipe
from moepeft.context import SiteContext
from moepeft.errors import ConfigError
from moepeft.methods._token_router import RoutedPairs
from moepeft.methods._validation import check_choices, check_count, check_dropout, check_positive
from moepeft.ops.losses import balance_loss, load_counts
from moepeft.protocols import Base, Capabilities, LinearSite

_SCRIPT = "README.md"


@dataclass(frozen=True, kw_only=True)
class MoLA(MethodConfig):
    """Configuration of MoLA.

    Attributes:
        rank: rank r of each expert's pair.
        alpha: numerator of the scale alpha / r.
        allocation: number of experts of each part of the depth, from the lowest layers to the highest; the layers are
            cut into as many equal parts as there are numbers.
        top_k: experts per token k.
        tokens: which tokens the balance loss counts.
        balance_coefficient: coefficient of the balance loss.
        dropout: probability of dropping an input feature of the adapters while training.
    """

    name: ClassVar[str] = "mola"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "released": {"tokens": "all"},
        "released_scienceqa": {"tokens": "all", "balance_coefficient": 0.0, "dropout": 0.05},
    }
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "flat": {"allocation": (5,)},
        "falling": {"allocation": (8, 6, 4, 2)},
        "hourglass": {"allocation": (8, 2, 2, 8)},
    }
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "scienceqa": Recipe(
            preset="released_scienceqa",
            sites=("q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "up_proj"),
            learning_rate=3e-4,
            batch_size=128,
            epochs=20,
            max_length=256,
            sources={
                **dict.fromkeys(("rank", "alpha", "allocation", "top_k", "dropout", "sites"), _SCRIPT),
                **dict.fromkeys(("learning_rate", "batch_size", "epochs", "max_length"), _SCRIPT),
                "balance_coefficient": "mola_training.py",
            },
        )
    }
    sizes: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int = 8
    alpha: float = 16.0
    allocation: tuple[int, ...] = (2, 4, 6, 8)
    top_k: int = 2
    tokens: Literal["real", "all"] = "real"
    balance_coefficient: float = 0.001
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("MoLA", "rank", self.rank)
        if not self.allocation:
            raise ConfigError("MoLA: allocation is empty, wanted a number of experts for each part of the depth")
        for experts in self.allocation:
            check_count("MoLA", "allocation", experts)
        check_count("MoLA", "top_k", self.top_k, high=min(self.allocation), hint="No layer may have fewer experts")
        check_positive("MoLA", "alpha", self.alpha)
        check_positive("MoLA", "balance_coefficient", self.balance_coefficient, zero=True)
        check_choices("MoLA", self)
        check_dropout("MoLA", self.dropout)

    @property
    def capabilities(self) -> Capabilities:
        """Routes every token on its own, so there is no one weight to merge into."""
        return Capabilities(
            routing="token",
            not_mergeable="every token has its own experts",
            aux_losses=("balance",) if self.balance_coefficient else (),
        )

    def with_experts(self, number: int) -> Self:
        """The same configuration with `number` experts at every layer."""
        return replace(self, allocation=(number,), top_k=min(self.top_k, number))

    def shared(self, sites: Sequence[LinearSite]) -> nn.Module:
        """The depth of each stack: what says which part of the depth a layer belongs to."""
        return Depths(sites)

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """As many experts as the site's layer is given, and their router."""
        assert isinstance(shared, Depths)
        return MoLAAdapter(site, self, experts_of(site, self.allocation, shared.depths))

    def count(self, sites: Sequence[LinearSite]) -> int:
        """E_l (r (in + out) + in) per site."""
        depths = Depths(sites).depths
        per_expert = {site: self.rank * (site.in_features + site.out_features) + site.in_features for site in sites}
        return sum(experts_of(site, self.allocation, depths) * number for site, number in per_expert.items())

    def aux_loss(self, name: str, terms: Sequence[Tensor]) -> Tensor:
        """Coefficient times the sum over sites; their numbers of experts differ, so their counts cannot be stacked."""
        return self.balance_coefficient * torch.stack([balance_loss(term) for term in terms]).sum() / self.top_k


class Depths(nn.Module):
    """Number of layers of each stack. It has no parameters: it carries the plan of a model to `build`."""

    def __init__(self, sites: Sequence[LinearSite]) -> None:
        super().__init__()
        self.depths: dict[str, int] = {}
        for site in sites:
            if site.layer is not None:
                self.depths[site.stack] = max(self.depths.get(site.stack, 0), site.layer + 1)


def experts_of(site: LinearSite, allocation: Sequence[int], depths: Mapping[str, int]) -> int:
    """Number of experts of a site; a layer outside of the repeated blocks counts as the highest one."""
    if site.layer is None:
        return allocation[-1]
    return allocation[site.layer * len(allocation) // depths[site.stack]]


def top_k_weights(p: Float[Tensor, "*n experts"], k: int) -> tuple[Float[Tensor, "*n experts"], Int[Tensor, "*n k"]]:
    """The k largest entries over their sum, zero elsewhere; and which they are."""
    top = p.topk(k, dim=-1)
    return torch.zeros_like(p).scatter(-1, top.indices, top.values / top.values.sum(dim=-1, keepdim=True)), top.indices


class MoLAAdapter(nn.Module):
    """The experts of one site."""

    def __init__(self, site: LinearSite, config: MoLA, experts: int) -> None:
        super().__init__()
        self.config = config
        self.experts = RoutedPairs(site, experts, config.rank, config.alpha, config.dropout)

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus each token's k experts."""
        y = base(x)
        p = self.experts.probabilities(x)
        weights, chosen = top_k_weights(p, self.config.top_k)
        ctx.stat("gates", weights)
        if self.training and self.config.balance_coefficient:
            mask = ctx.mask(x) if self.config.tokens == "real" else None
            ctx.loss("balance", ctx.joint_sum(load_counts(p, chosen, mask)))
        return self.experts.add_mixture(y, x, weights)
