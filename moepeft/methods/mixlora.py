"""MixLoRA: a feed-forward network becomes a mixture of experts that share its frozen weights.

Paper: Li et al., MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts,
arXiv 2404.15159, equations 4 to 8.
Release: TUDB-Labs/MixLoRA, commit d59d09b6 (block), TUDB-Labs/MoE-PEFT, commit 40f8cb74 (loss); Apache-2.0.

    P = softmax(router x) per token; the k largest entries, divided by their sum, are the weights w_j of experts i_j
    f_i(x): the frozen FFN with LoRA pair i on each of its projections
    y = sum_j w_j f_{i_j}(x);   attention projections carry a plain LoRA (option)

`feed_forward` is that definition over the pieces of the host's FFN. The host runs the same pieces: its inward
projections answer with k copies of the rows, one per choice ("streams"), stacked in front of the batch; its own
activation code carries the streams, and its outward projection sums them with their weights.

Differences between paper and release (preset `released` reproduces those that change numbers):
* the balance loss of the release pools the counts of all layers before multiplying, so that imbalances of different
  layers can cancel: ``balance="pooled"``; per layer and averaged here. Both count all k choices of a token;
* the release keeps dropout on at inference and hides its experts from ``state_dict()``: not reproduced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moepeft.config import MethodConfig, Recipe
from moepeft.context import SiteContext
from moepeft.errors import ConfigError, Unsupported
from moepeft.fast import fast_paths_enabled, has_fast_path
from moepeft.methods._fast import mixlora as _fast
from moepeft.methods._released.mixlora import RECIPES
from moepeft.methods._validation import check_choice, check_choices, check_count, check_dropout, check_positive
from moepeft.methods.lora import LoRA, LoRAAdapter
from moepeft.ops.draws import normal, uniform
from moepeft.ops.linear import computing_type, dropout_of
from moepeft.ops.losses import balance_loss, load_counts
from moepeft.ops.precision import without_autocast
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
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "released": {"balance": "pooled", "dropout": 0.05},
    }
    recipes: ClassVar[Mapping[str, Recipe]] = RECIPES
    sizes: ClassVar[tuple[str, ...]] = ("rank", "num_experts")

    rank: int = 16
    alpha: float = 32.0
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
        return self.balance_coefficient * balance_loss(counts.sum(dim=0) if self.balance == "pooled" else counts).mean()


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
        indices: the experts i_j.
        weights: their weights w_j, in float32 at least.
        experts: the experts i_j one-hot over E.
        ready: what a fast path has made of them; None for the definition.
    """

    indices: Int[Tensor, "*n k"]
    weights: Float[Tensor, "k *n 1"]
    experts: Int[Tensor, "k *n experts"]
    ready: _fast.Ready | None = None


class Pairs(NamedTuple):
    """The LoRA pairs of all experts of one projection, concatenated: A (E r, in), B (out, E r); the scale alpha / r."""

    A: Float[Tensor, "all_r i"]
    B: Float[Tensor, "o all_r"]
    scale: float


def choose(probabilities: Float[Tensor, "*n experts"], k: int) -> Choice:
    """The k likeliest experts of each token, their probabilities divided by their sum."""
    top = probabilities.topk(k, dim=-1)
    weights = top.values / top.values.sum(dim=-1, keepdim=True)
    experts = F.one_hot(top.indices.movedim(-1, 0), probabilities.shape[-1])
    return Choice(top.indices, weights.movedim(-1, 0).unsqueeze(-1), experts)


def update_of_experts(
    x: Float[Tensor, "#k *n i"], pairs: Pairs, experts: Int[Tensor, "k *n experts"]
) -> Float[Tensor, "k *n o"]:
    """(alpha / r) B_i A_i x for the expert i that each token chose."""
    number = experts.shape[-1]
    update = x.new_zeros(())
    for i, (A_i, B_i) in enumerate(zip(pairs.A.chunk(number), pairs.B.chunk(number, dim=1), strict=True)):
        of_i = F.linear(F.linear(x, A_i.to(x.dtype)), B_i.to(x.dtype)) * pairs.scale
        update = update + experts[..., i, None].to(of_i.dtype) * of_i
    return update


@has_fast_path(_fast.project_in)
def project_in(
    y: Float[Tensor, "*n o"], x: Float[Tensor, "*n i"], pairs: Pairs | None, choice: Choice
) -> Float[Tensor, "k *n o"]:
    """Stream j: y = W0 x, and the update by expert i_j of each token."""
    streams = y.expand(len(choice.experts), *y.shape)
    return streams if pairs is None else streams + update_of_experts(x[None], pairs, choice.experts).to(y.dtype)


@has_fast_path(_fast.project_out)
def project_out(
    base: Base, h: Float[Tensor, "k *n i"], x: Float[Tensor, "k *n i"], pairs: Pairs | None, choice: Choice
) -> Float[Tensor, "*n o"]:
    """sum_j w_j (W0 h_j + the update by expert i_j of x_j): the streams h, and x, which is h after dropout."""
    outputs = base(h.flatten(0, 1))
    outputs = outputs.reshape(*h.shape[:2], *outputs.shape[1:])
    if pairs is not None:
        outputs = outputs + update_of_experts(x, pairs, choice.experts).to(outputs.dtype)
    return (outputs * choice.weights.to(outputs.dtype)).sum(dim=0)


def feed_forward(
    x: Float[Tensor, "*n d"],
    choice: Choice,
    inward: Sequence[tuple[Base, Pairs | None]],
    activation: Callable[..., Tensor],
    outward: tuple[Base, Pairs | None],
) -> Float[Tensor, "*n d"]:
    """y = sum_j w_j f_{i_j}(x).

    Args:
        x: input of the FFN.
        choice: `choose` of the router's probabilities.
        inward: the FFN's inward projections: frozen layer, and the experts' pairs if it carries any.
        activation: what the FFN makes of the inward projections' answers: ``silu(gate) * up``, ``relu(up)``.
        outward: its outward projection.
    """
    h = activation(*(project_in(base(x), x, pairs, choice) for base, pairs in inward))
    base, pairs = outward
    return project_out(base, h, h, pairs, choice)


class _Projection(nn.Module):
    """A projection of an FFN with the pairs of all experts."""

    def __init__(self, site: LinearSite, config: MixLoRA) -> None:
        super().__init__()
        self.config, self.scale = config, config.alpha / config.rank
        self.has_experts = site.role in config.targets
        self.dropout = dropout_of(config.dropout)
        if self.has_experts:
            width = config.num_experts * config.rank
            self.A = nn.Parameter(uniform((width, site.in_features), site.in_features**-0.5))
            self.B = nn.Parameter(uniform((site.out_features, width), 0.0))

    @property
    def pairs(self) -> Pairs | None:
        """The experts' pairs, if this projection carries any."""
        return Pairs(self.A, self.B, self.scale) if self.has_experts else None


class InwardAdapter(_Projection):
    """Gate or up projection: answers with k streams of rows, one per choice, stacked in front of the batch."""

    def __init__(self, site: LinearSite, config: MixLoRA, routers: Routers) -> None:
        super().__init__(site, config)
        self._routers = (routers,)  # in a tuple: the routers are registered once, elsewhere

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "k_rows *n o"]:
        """Stream j holds the rows as expert i_j of each token projects them."""
        block = ctx.site.block
        assert block is not None
        choice = ctx.of_input(block, x, lambda: self._route(block, x, ctx))  # once per FFN: both projections read x
        y = base(x)
        return project_in(y, self.dropout(x) if self.has_experts else x, self.pairs, choice).flatten(0, 1)

    def _route(self, block: str, x: Tensor, ctx: SiteContext) -> Choice:
        weight = self._routers[0][block]
        with without_autocast(x):
            probabilities = F.linear(x.to(weight.dtype), weight).softmax(dim=-1)
        choice = choose(probabilities, self.config.top_k)
        if self.training and self.config.balance_coefficient:
            ctx.loss("balance", ctx.joint_sum(load_counts(probabilities, choice.indices, ctx.mask(x))))
        ctx.stat("probabilities", probabilities)
        ctx.stat("gates", lambda: (choice.experts * choice.weights).sum(dim=0))
        pairs = self.config.rank, self.scale, computing_type(x)
        return choice._replace(ready=_fast.make_ready(choice, *pairs)) if fast_paths_enabled() else choice


class OutwardAdapter(_Projection):
    """Down projection: sums the streams with their weights."""

    def __init__(self, site: LinearSite, config: MixLoRA) -> None:
        super().__init__(site, config)
        self.streams = config.top_k  # its input is so many times all rows

    def forward(self, x: Float[Tensor, "k_rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """Sum over streams of weight times projection."""
        assert ctx.site.block is not None
        choice: Choice = ctx.taken(ctx.site.block)  # it holds activations: let them go with this FFN
        streams = torch.unflatten(x, 0, (self.streams, len(x) // self.streams))
        return project_out(base, streams, self.dropout(streams) if self.has_experts else streams, self.pairs, choice)
