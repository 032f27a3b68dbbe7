"""MixLoRA: a feed-forward network becomes a mixture of experts that share its frozen weights.

Paper: Li et al., MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts,
arXiv 2404.15159, equations 4 to 8.
Release: TUDB-Labs/MixLoRA, commit d59d09b6 (block), TUDB-Labs/MoE-PEFT, commit 40f8cb74 (loss); Apache-2.0.

    P = softmax(router x) per token; the k largest entries, divided by their sum, are the weights w_j of experts i_j
    f_i(x): the frozen FFN with LoRA pair i on each of its projections
    y = sum_j w_j f_{i_j}(x);   attention projections carry a plain LoRA (option)

How it is computed. An FFN is linear, element-wise, linear. Each inward projection answers with k copies of the rows,
one per choice ("streams"), stacked in front of the batch: the frozen product is computed once, the choice of expert
is a mask on the concatenated rank space of all experts, and the host's own activation code carries the streams on
whatever its architecture. The outward projection is linear, so the streams are summed with their weights before it
and the frozen product is computed once again. No gather, no loop over experts, no code of the host is replaced.

Differences between paper and release (preset `released` reproduces those that change numbers):
* the balance loss of the release pools the counts of all layers before multiplying, so that imbalances of different
  layers can cancel: ``balance="pooled"``; per layer and averaged here. Both count all k choices of a token;
* the release keeps dropout on at inference and hides its experts from ``state_dict()``: not reproduced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moepeft.config import MethodConfig
from moepeft.context import SiteContext
from moepeft.errors import ConfigError, Unsupported
from moepeft.methods._validation import check_choice, check_choices, check_count, check_dropout, check_positive
from moepeft.methods.lora import LoRA, LoRAAdapter
from moepeft.ops.draws import normal, uniform
from moepeft.ops.linear import add_linear
from moepeft.ops.losses import balance_loss, load_counts
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class MixLoRA(MethodConfig):
    """Configuration of MixLoRA.

    Attributes:
        rank: rank r of each expert's pair.
        alpha: numerator of the scale alpha / r.
        num_experts: number of experts E per FFN.
        top_k: experts per token k.
        targets: which projections of the FFN carry experts.
        attention: put a plain LoRA of the same rank on the other chosen layers.
        balance: load-balancing loss per layer and averaged, or pooled over layers.
        balance_coefficient: its coefficient.
        dropout: probability of dropping an input feature of the adapters while training.
    """

    name: ClassVar[str] = "mixlora"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {}, "released": {"balance": "pooled"}}
    sizes: ClassVar[tuple[str, ...]] = ("rank", "num_experts")

    rank: int = 8
    alpha: float = 16.0
    num_experts: int = 8
    top_k: int = 2
    targets: tuple[str, ...] = ("gate", "up", "down")
    attention: bool = True
    balance: Literal["layer", "pooled"] = "layer"
    balance_coefficient: float = 0.01
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("MixLoRA", "rank", self.rank)
        check_count("MixLoRA", "num_experts", self.num_experts)
        check_count(
            "MixLoRA",
            "top_k",
            self.top_k,
            high=self.num_experts,
            hint="top_k counts the experts of one token",
        )
        check_positive("MixLoRA", "alpha", self.alpha)
        check_positive("MixLoRA", "balance_coefficient", self.balance_coefficient, zero=True)
        check_choices("MixLoRA", self)
        check_dropout("MixLoRA", self.dropout)
        if not self.targets:
            raise ConfigError("MixLoRA: targets is empty, wanted at least one of 'gate', 'up', 'down'")
        for target in self.targets:
            check_choice("MixLoRA", "targets", target, ("gate", "up", "down"))

    @property
    def capabilities(self) -> Capabilities:
        """Routes every token on its own, so there is no one weight to merge into."""
        return Capabilities(
            routing="token",
            not_mergeable="every token has its own experts",
            aux_losses=("balance",) if self.balance_coefficient else (),
        )

    def select(self, sites: Sequence[LinearSite]) -> Sequence[LinearSite]:
        """Whole feed-forward networks, and the other sites if attention has LoRA."""
        chosen = [site for site in sites if site.block is not None or self.attention]
        blocks: dict[str, set[str]] = {}
        for site in chosen:
            if site.block is not None:
                blocks.setdefault(site.block, set()).add(site.role)
        if not blocks:
            raise Unsupported(
                "MixLoRA needs feed-forward networks (roles up, down and perhaps gate) among its sites, found none"
            )
        for block, roles in blocks.items():
            if not {"up", "down"} <= roles:
                raise Unsupported(
                    f"MixLoRA replaces whole feed-forward networks, but of {block!r} only {sorted(roles)} were chosen: "
                    "add the missing roles to `sites`"
                )
        return chosen

    def shared(self, sites: Sequence[LinearSite]) -> nn.Module:
        """One router per feed-forward network."""
        widths = {site.block: site.in_features for site in sites if site.block is not None and site.role == "up"}
        return Routers(widths, self.num_experts)

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """An inward or outward projection of an FFN, or a plain LoRA elsewhere."""
        assert isinstance(shared, Routers)
        if site.block is None:
            return LoRAAdapter(site, LoRA(rank=self.rank, alpha=self.alpha, dropout=self.dropout))
        return OutwardAdapter(site, self) if site.role == "down" else InwardAdapter(site, self, shared)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """E r (in + out) per target projection, E in per router, r (in + out) per plain LoRA."""
        total = 0
        for site in sites:
            pairs = 1 if site.block is None else self.num_experts * (site.role in self.targets)
            total += pairs * self.rank * (site.in_features + site.out_features)
            total += self.num_experts * site.in_features * (site.role == "up" and site.block is not None)
        return total

    def aux_loss(self, name: str, terms: Sequence[Tensor]) -> Tensor:
        """Coefficient times the balance loss: the mean over layers, or of the pooled counts."""
        counts = torch.stack(list(terms))
        if self.balance == "pooled":
            return self.balance_coefficient * balance_loss(counts.sum(dim=0))
        return self.balance_coefficient * torch.stack([balance_loss(layer) for layer in counts]).mean()


class Routers(nn.Module):
    """The routers' weights (E, d_model), by name of the feed-forward network."""

    def __init__(self, widths: Mapping[str, int], num_experts: int) -> None:
        super().__init__()
        self.router = nn.ParameterDict(
            {self.key(block): nn.Parameter(normal((num_experts, width), 0.02)) for block, width in widths.items()}
        )

    @staticmethod
    def key(block: str) -> str:
        """Parameter names must not contain dots, nor be empty (an FFN that is the whole model)."""
        return block.replace(".", "/") or "/"

    def __getitem__(self, block: str) -> Tensor:
        weight: Tensor = self.router[self.key(block)]
        return weight


class Choice(NamedTuple):
    """What the router chose for the tokens of an FFN's input.

    Attributes:
        weights: weights of the k choices, (k, rows, ..., 1), in float32 at least.
        experts: which expert each choice is, one-hot over E, (k, rows, ..., E).
    """

    weights: Tensor
    experts: Tensor


class _ExpertPairs(nn.Module):
    """The pairs of all experts of one projection, concatenated: A (E r, in), B (out, E r)."""

    def __init__(self, site: LinearSite, config: MixLoRA) -> None:
        super().__init__()
        self.config = config
        self.scale = config.alpha / config.rank
        self.has_experts = site.role in config.targets
        self.dropout = nn.Dropout(config.dropout)
        if self.has_experts:
            width = config.num_experts * config.rank
            self.A = nn.Parameter(uniform((width, site.in_features), site.in_features**-0.5))
            self.B = nn.Parameter(uniform((site.out_features, width), 0.0))

    def rank_mask(self, experts: Tensor, like: Tensor) -> Tensor:
        """The choice of expert as a factor on the concatenated rank space, (..., E r)."""
        return experts.to(like.dtype).repeat_interleave(self.config.rank, dim=-1)


class InwardAdapter(_ExpertPairs):
    """Gate or up projection: answers with k streams of rows, one per choice, stacked in front of the batch."""

    def __init__(self, site: LinearSite, config: MixLoRA, routers: Routers) -> None:
        super().__init__(site, config)
        self._routers = (routers,)  # in a tuple: the routers are registered once, elsewhere

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "k_rows *n o"]:
        """Stream j holds the rows as expert i_j of each token projects them."""
        block = ctx.site.block
        assert block is not None
        # Routed once per FFN: its first projection does it, the second finds the choice made for the same tensor.
        choice = ctx.of_input(block, x, lambda: self._route(block, x, ctx))
        y = base(x)
        if not self.has_experts:
            return y.repeat(self.config.top_k, *(1,) * (y.dim() - 1))
        down = F.linear(self.dropout(x), self.A.to(x.dtype)) * self.scale
        streams = down * self.rank_mask(choice.experts, down)
        return add_linear(y, streams, self.B).flatten(0, 1)

    def _route(self, block: str, x: Tensor, ctx: SiteContext) -> Choice:
        weight = self._routers[0][block]
        with torch.autocast(device_type=x.device.type, enabled=False):
            probabilities = F.linear(x.to(weight.dtype), weight).softmax(dim=-1)
        top = probabilities.topk(self.config.top_k, dim=-1)
        if self.training and self.config.balance_coefficient:
            ctx.loss("balance", ctx.joint_sum(load_counts(probabilities, top.indices, ctx.mask(x))))
        shares = top.values / top.values.sum(dim=-1, keepdim=True)
        ctx.stat("probabilities", probabilities)
        ctx.stat("gates", lambda: torch.zeros_like(probabilities).scatter(-1, top.indices, shares))
        weights = shares.movedim(-1, 0).unsqueeze(-1)
        return Choice(weights, F.one_hot(top.indices.movedim(-1, 0), self.config.num_experts))


class OutwardAdapter(_ExpertPairs):
    """Down projection: sums the streams with their weights in front of the one frozen product."""

    def forward(self, x: Float[Tensor, "k_rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """Sum over streams of weight times projection."""
        block = ctx.site.block
        assert block is not None
        choice: Choice = ctx.taken(block)  # it holds activations: let them go with this FFN
        streams = x.reshape(self.config.top_k, -1, *x.shape[1:])
        weights = choice.weights.to(x.dtype)
        y = base((streams * weights).sum(dim=0))
        if not self.has_experts:
            return y
        down = F.linear(self.dropout(streams), self.A.to(x.dtype)) * (self.scale * weights)
        down = (down * self.rank_mask(choice.experts, down)).sum(dim=0)
        return add_linear(y, down, self.B)
