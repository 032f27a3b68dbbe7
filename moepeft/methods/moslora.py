"""MoSLoRA: a LoRA whose rank space passes through a mixer.

Paper: Wu et al., Mixture-of-Subspaces in Low-Rank Adaptation, arXiv 2406.11909, section 3.
Release: wutaiqiang/MoSLoRA, commit bba79b54 (Apache-2.0, a fork of peft).

    y = W0 x + (alpha / r) B W A x        A (r, in), mixer W (r, r), B (out, r)

LoRA is the case W = I. With the mixer every row of A meets every column of B.

Differences between paper and release: none that changes a number. The paper tries several starts of the mixer: the
release keeps Kaiming (``mixer="kaiming"``, uniform in +-1/sqrt(r)) and leaves the others as comments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moepeft.config import MethodConfig, Recipe
from moepeft.context import SiteContext
from moepeft.methods._validation import check_choices, check_count, check_dropout, check_positive
from moepeft.ops.draws import uniform
from moepeft.ops.linear import dropout_of
from moepeft.protocols import Base, LinearSite


@dataclass(frozen=True, kw_only=True)
class MoSLoRA(MethodConfig):
    """Configuration of MoSLoRA.

    Attributes:
        rank: rank r of the update.
        alpha: numerator of the scale alpha / r.
        mixer: how the mixer starts: uniform in +-1/sqrt(r), or orthogonal.
        dropout: probability of dropping an input feature of the adapter while training.
    """

    name: ClassVar[str] = "moslora"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "released": {},
        "released_commonsense": {"rank": 16, "alpha": 32.0, "dropout": 0.05},
    }
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {"orthogonal": {"mixer": "orthogonal"}}
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "commonsense": Recipe(
            preset="released_commonsense",
            sites=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
            learning_rate=3e-4,
            batch_size=16,
            epochs=3,
            max_length=256,
            sources={
                **dict.fromkeys(
                    ("rank", "alpha", "sites", "learning_rate", "batch_size", "epochs", "max_length"),
                    "commonsense_reasoning/train_moslora.sh",
                ),
                "dropout": "commonsense_reasoning/finetune.py",
            },
        )
    }

    rank: int = 8
    alpha: float = 32.0
    mixer: Literal["kaiming", "orthogonal"] = "kaiming"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("MoSLoRA", "rank", self.rank)
        check_positive("MoSLoRA", "alpha", self.alpha)
        check_choices("MoSLoRA", self)
        check_dropout("MoSLoRA", self.dropout)

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """Two factors and the mixer between them."""
        return MoSLoRAAdapter(site, self)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """r (in + out) + r^2 per site."""
        return sum(self.rank * (site.in_features + site.out_features + self.rank) for site in sites)


def update(
    x: Float[Tensor, "*n i"], A: Float[Tensor, "r i"], mixer: Float[Tensor, "r r"], B: Float[Tensor, "o r"]
) -> Float[Tensor, "*n o"]:
    """B W A x."""
    return F.linear(F.linear(F.linear(x, A), mixer), B)


class MoSLoRAAdapter(nn.Module):
    """The factors A (r, in) and B (out, r) of one site, and its mixer (r, r)."""

    def __init__(self, site: LinearSite, config: MoSLoRA) -> None:
        super().__init__()
        self.scale = config.alpha / config.rank
        self.A = nn.Parameter(uniform((config.rank, site.in_features), site.in_features**-0.5))
        self.mixer = nn.Parameter(uniform((config.rank, config.rank), config.rank**-0.5))
        if config.mixer == "orthogonal":
            nn.init.orthogonal_(self.mixer)
        self.B = nn.Parameter(uniform((site.out_features, config.rank), 0.0))
        self.dropout = dropout_of(config.dropout)

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus the scaled update."""
        y = base(x)
        A, mixer, B = (factor.to(x.dtype) for factor in (self.A, self.mixer, self.B))
        return y + self.scale * update(self.dropout(x), A, mixer, B).to(y.dtype)

    def delta_weight(self, task: int | None) -> Float[Tensor, "o i"]:
        """(alpha / r) B W A."""
        A, B = self.lora_factors(task)
        return self.scale * (B @ A)

    def lora_factors(self, task: int | None) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        """W A and B."""
        return self.mixer @ self.A, self.B
