"""EPT: experts of several scales grown from one low-rank seed by deconvolution.

Paper: Zhang, Yan et al., Expert Pyramid Tuning: Efficient Parameter Fine-Tuning for Expertise-Driven Task Allocation,
arXiv 2603.12577 (CVPR 2026).
Release: Yan-Zhenwei/EPT, commit 54ed6edc (no licence: computed anew, nothing copied).

    seed, shared by a site's experts: A (r, in // s_min), B (out // s_min, r), both Gaussian
    expert e with kernel size s: Z_e = B[:out // s] A[:, :in // s]                 the adaptive pruner
                                 W_e = deconv(Z_e; K_e), stride s, K_e (s, s)      zero at the start
    router: logits over experts from the task's embedding (gate (E, in), table (T, in) per site), or from the token
    y = W0 x + (alpha / r) sum over the top k of  g_e (d_e / d_max) W_e x

How it is computed. A transposed convolution whose stride is its kernel size is a Kronecker product: W_e = Z_e (x) K_e
(zero-padded where s does not divide a side), and by the mixed-product rule

    (B A) (x) K  =  (B (x) I_s) (I_r (x) K) (A (x) I_s)

so that each scale is a LoRA of rank r s with structured factors and its kernel in the rank space. W_e is never built.
The factors of all scales stand side by side: one product down, one up. The experts of one scale share them, and their
kernels add up, weighed by the gates, before they multiply: K_s = sum of g_e K_e over the experts of scale s.

The dimension factor d_e / d_max is the width of the expert's seed, out // s, over that of the widest: the seed's first
rows serve every scale and are updated most often. A contrastive loss over tasks, averaged over sites, pulls a row's
summary towards its task's embedding.

Differences between paper and release (preset `released` reproduces those that change numbers):
* the release convolves activations, not the matrix: ``operator="channel"``. An expert reads only the first in // s
  features, and its kernel (out // s, s) stretches each output channel on its own;
* it softmaxes the top-k probabilities once more: ``gates="double_softmax"``; here softmax over the chosen logits;
* it starts kernels at random, not zero: ``kernel_init="uniform"``, and has no dimension factor;
* its gate has a bias (``gate_bias``), and its contrastive loss looks at position 0: ``anchor="first"``;
* its decoder's contrastive terms are dropped and the weight depends on literals for T5-base: not reproduced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moepeft.context import SiteContext
from moepeft.errors import ConfigError, Unsupported
from moepeft.methods._common import (
    check_choice,
    check_count,
    check_dropout,
    check_positive,
    normal,
    row_summary,
    uniform,
)
from moepeft.protocols import Base, Capabilities, LinearSite
from moepeft.routing import contrastive_task_loss, top_k_gates


@dataclass(frozen=True, kw_only=True)
class EPT:
    """Configuration of EPT.

    Attributes:
        rank: rank r of the seed.
        alpha: numerator of the scale alpha / r.
        kernels: kernel size of each expert.
        top_k: experts per task (or token).
        num_tasks: number of tasks T.
        routing: route by the task's embedding (mergeable), or by each token.
        router_temperature: divides the router's logits.
        gates: softmax over the chosen logits, or the release's softmax of the chosen probabilities.
        gate_bias: whether the gate has a bias.
        operator: the equations' deconvolution of the seed, or the release's of the activations.
        kernel_init: start of the kernels.
        seed_init: start of A and B; zero is the paper's ablation.
        dimension_scale: multiply each expert by d_e / d_max.
        contrastive: coefficient of the contrastive loss.
        temperature: its temperature.
        anchor: a row's summary in it: mean over real tokens, or position 0.
        dropout: probability of dropping an input feature of the adapter while training.
    """

    name: ClassVar[str] = "ept"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "released": {
            "operator": "channel",
            "gates": "double_softmax",
            "gate_bias": True,
            "kernel_init": "uniform",
            "seed_init": "uniform",
            "dimension_scale": False,
            "anchor": "first",
        },
    }

    rank: int = 8
    alpha: float = 32.0
    kernels: tuple[int, ...] = (2, 2, 4, 4, 6, 6, 8, 8)
    top_k: int = 2
    num_tasks: int = 1
    routing: Literal["task", "token"] = "task"
    router_temperature: float = 1.0
    gates: Literal["softmax", "double_softmax"] = "softmax"
    gate_bias: bool = False
    operator: Literal["kronecker", "channel"] = "kronecker"
    kernel_init: Literal["zero", "uniform"] = "zero"
    seed_init: Literal["normal", "uniform"] = "normal"
    dimension_scale: bool = True
    contrastive: float = 0.1
    temperature: float = 0.05
    anchor: Literal["mean", "first"] = "mean"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("EPT", "rank", self.rank)
        check_count("EPT", "num_tasks", self.num_tasks)
        if not self.kernels:
            raise ConfigError("EPT: kernels is empty, wanted the kernel size of every expert, e.g. (2, 2, 4, 4)")
        for size in self.kernels:
            check_count("EPT", "kernels", size)
        check_count("EPT", "top_k", self.top_k, high=len(self.kernels), hint="there are as many experts as kernels")
        for field in ("alpha", "router_temperature", "temperature"):
            check_positive("EPT", field, getattr(self, field))
        check_positive("EPT", "contrastive", self.contrastive, zero=True)
        check_choice("EPT", "routing", self.routing, ("task", "token"))
        check_choice("EPT", "gates", self.gates, ("softmax", "double_softmax"))
        check_choice("EPT", "operator", self.operator, ("kronecker", "channel"))
        check_choice("EPT", "kernel_init", self.kernel_init, ("zero", "uniform"))
        check_choice("EPT", "seed_init", self.seed_init, ("normal", "uniform"))
        check_choice("EPT", "anchor", self.anchor, ("mean", "first"))
        check_dropout("EPT", self.dropout)

    @property
    def capabilities(self) -> Capabilities:
        """Routed by task it merges per task; routed by token it cannot."""
        untrained: tuple[str, ...] = ()
        if self.routing == "token" and not self.contrastive:
            untrained = ("task_embedding",)
        elif self.routing == "task" and self.top_k == 1:
            # A softmax over one logit is the constant 1: no gradient reaches the router.
            untrained = ("gate.weight", "gate.bias", *(() if self.contrastive else ("task_embedding",)))
        return Capabilities(
            routing=self.routing,
            not_mergeable=None if self.routing == "task" else "every token has its own experts (routing='token')",
            identity_at_init=self.kernel_init == "zero",
            aux_losses=("contrastive",) if self.contrastive else (),
            never_trained=untrained,
        )

    @property
    def scales(self) -> tuple[int, ...]:
        """The distinct kernel sizes, ascending."""
        return tuple(sorted(set(self.kernels)))

    def select(self, sites: Sequence[LinearSite]) -> Sequence[LinearSite]:
        """Every site, if each side is at least as wide as the largest kernel."""
        for site in sites:
            if min(site.in_features, site.out_features) < max(self.kernels):
                raise Unsupported(
                    f"EPT's largest kernel {max(self.kernels)} does not fit site {site.name!r} of shape "
                    f"{site.in_features} -> {site.out_features}: leave the site out or choose smaller kernels"
                )
        return sites

    def shared(self, sites: Sequence[LinearSite]) -> None:
        """Nothing is shared between sites: seed, router and task table are per site."""

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """Seed, kernels, router and task table of one site."""
        return EPTAdapter(site, self)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """Per site: r (in + out) / s_min, the kernels, E in (and E for a bias) for the gate, T in for the table."""
        total = 0
        for site in sites:
            i, o, smallest = site.in_features, site.out_features, min(self.kernels)
            total += self.rank * (i // smallest + o // smallest)
            total += sum(s * s if self.operator == "kronecker" else (o // s) * s for s in self.kernels)
            total += len(self.kernels) * (i + self.gate_bias) + self.num_tasks * i
        return total

    def aux_loss(self, name: str, terms: Sequence[Tensor]) -> Tensor:
        """Coefficient times the mean over sites."""
        return self.contrastive * torch.stack(list(terms)).mean()


class EPTAdapter(nn.Module):
    """Seed A (r, in // s_min), B (out // s_min, r); per scale its experts' kernels (experts, s or out // s, s)."""

    def __init__(self, site: LinearSite, config: EPT) -> None:
        super().__init__()
        self.config = config
        self.in_features, self.out_features = site.in_features, site.out_features
        self.scale = config.alpha / config.rank
        i, o, r = site.in_features, site.out_features, config.rank
        smallest = min(config.kernels)
        draw = normal if config.seed_init == "normal" else uniform
        self.A = nn.Parameter(draw((r, i // smallest), (i // smallest) ** -0.5))
        self.B = nn.Parameter(draw((o // smallest, r), r**-0.5))
        bound = o**-0.5 if config.kernel_init == "uniform" else 0.0
        self.experts_of = [[e for e, size in enumerate(config.kernels) if size == s] for s in config.scales]
        self.kernels = nn.ParameterList(
            nn.Parameter(uniform((len(experts), s if config.operator == "kronecker" else o // s, s), bound))
            for s, experts in zip(config.scales, self.experts_of, strict=True)
        )
        self.task_embedding = nn.Parameter(normal((config.num_tasks, i), 0.01))
        self.gate = nn.Linear(i, len(config.kernels), bias=config.gate_bias)
        widest = o // smallest
        factors = [(o // s) / widest if config.dimension_scale else 1.0 for s in config.kernels]
        self.register_buffer("expert_scale", self.scale * torch.tensor(factors), persistent=False)
        self.dropout = nn.Dropout(config.dropout)

    expert_scale: Tensor

    def expert_weights(self, routed: Float[Tensor, "*n i"]) -> Float[Tensor, "*n experts"]:
        """Gates of what is routed (task embeddings or tokens): zero but for the top k; no dimension factor yet."""
        with torch.autocast(device_type=routed.device.type, enabled=False):
            logits = self.gate(routed.to(self.gate.weight.dtype)) / self.config.router_temperature
        return self.gates(logits)

    def gates(self, logits: Float[Tensor, "*n experts"]) -> Float[Tensor, "*n experts"]:
        """Gates from the router's logits."""
        if self.config.gates == "double_softmax":
            return top_k_gates(logits.softmax(dim=-1), self.config.top_k)
        return top_k_gates(logits, self.config.top_k)

    def kernels_of(self, gates: Float[Tensor, "*n experts"]) -> list[Tensor]:
        """Per scale the gated sum of kernels, scale and dimension factor included, (*n, s or out // s, s)."""
        weights = gates * self.expert_scale
        return [
            torch.einsum("...e,epq->...pq", weights[..., experts], kernel)
            for experts, kernel in zip(self.experts_of, self.kernels, strict=True)
        ]

    def update(self, x: Float[Tensor, "rows *n i"], gates: Tensor) -> Float[Tensor, "rows *n o"]:
        """Sum over experts of gate times W_e x.

        Args:
            x: input.
            gates: (rows, experts) or (rows, *n, experts).
        """
        if gates.dim() < x.dim():
            gates = gates.reshape(gates.shape[0], *(1,) * (x.dim() - 2), gates.shape[-1])
        kernels = [kernel.to(x.dtype) for kernel in self.kernels_of(gates)]
        if self.config.operator == "channel":
            channels = [
                pad_to(self.out_features, channel_update(x, A.to(x.dtype), B.to(x.dtype), kernel))
                for A, B, kernel in zip(*self.seeds(), kernels, strict=True)
            ]
            return torch.stack(channels).sum(dim=0)
        down, up = self.structured_factors()
        parts = torch.split(F.linear(x, down.to(x.dtype)), [self.config.rank * s for s in self.config.scales], dim=-1)
        mixed = [mix_scale(part, kernel) for part, kernel in zip(parts, kernels, strict=True)]
        return F.linear(torch.cat(mixed, dim=-1), up.to(x.dtype))

    def seeds(self) -> tuple[list[Tensor], list[Tensor]]:
        """The adaptive pruner: per scale A[:, :in // s] and B[:out // s]."""
        scales = self.config.scales
        return [self.A[:, : self.in_features // s] for s in scales], [self.B[: self.out_features // s] for s in scales]

    def structured_factors(self) -> tuple[Float[Tensor, "k i"], Float[Tensor, "o k"]]:
        """A (x) I_s and B (x) I_s of all scales side by side, k = r times the sum of the scales."""
        identities = [torch.eye(s, dtype=self.A.dtype, device=self.A.device) for s in self.config.scales]
        downs, ups = ([torch.kron(f, eye) for f, eye in zip(seed, identities, strict=True)] for seed in self.seeds())
        down = torch.cat([pad_to(self.in_features, factor) for factor in downs])
        up = torch.cat([pad_to(self.out_features, factor.T).T for factor in ups], dim=1)
        return down, up

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus the chosen experts' updates."""
        y = base(x)
        tasks = ctx.tasks(x.shape[0]) if self.config.routing == "task" or self._wants_loss else None
        if self.config.routing == "token":
            gates = self.expert_weights(x)
        else:
            gates = self.expert_weights(self.task_embedding)[tasks]
        ctx.stat("gates", gates)
        if self._wants_loss:
            assert tasks is not None
            self._record_loss(x, tasks, ctx)
        return y + self.update(self.dropout(x), gates).to(y.dtype)

    @property
    def _wants_loss(self) -> bool:
        return self.training and self.config.contrastive > 0

    def _record_loss(self, x: Tensor, tasks: Int[Tensor, "rows"], ctx: SiteContext) -> None:
        summary = row_summary(x, ctx, self.config.anchor)
        ctx.loss("contrastive", contrastive_task_loss(summary, self.task_embedding, tasks, self.config.temperature))

    def delta_weight(self, task: int | None) -> Float[Tensor, "o i"]:
        """The task's update as a matrix: what `update` does to the unit vectors."""
        assert task is not None
        gates = self.expert_weights(self.task_embedding[task])
        eye = torch.eye(self.in_features, device=self.A.device, dtype=self.A.dtype)
        return self.update(eye, gates.expand(self.in_features, -1)).T


def mix_scale(part: Float[Tensor, "rows *n r_s"], kernel: Float[Tensor, "rows *k s s"]) -> Float[Tensor, "rows *n r_s"]:
    """Multiply by I_r (x) K, K one kernel per row or per token (dimensions of size 1 between)."""
    s = kernel.shape[-1]
    pieces = part.reshape(*part.shape[:-1], -1, s)
    if kernel.dim() > 3 and all(size == 1 for size in kernel.shape[1:-2]):
        # One kernel for all tokens of a row: one product per row, not one per token.
        row_wise = pieces.flatten(1, -2) @ kernel.flatten(0, -3).transpose(1, 2)
        return row_wise.reshape(part.shape)
    return (pieces @ kernel.transpose(-1, -2)).flatten(-2)


def channel_update(
    x: Float[Tensor, "*n i"],
    A: Float[Tensor, "r m"],
    B: Float[Tensor, "h r"],
    kernel: Float[Tensor, "*k h s"],
) -> Float[Tensor, "*n h_s"]:
    """The release's operator: the seed maps the first `m` features to `h` channels, each stretched by its kernel."""
    channels = F.linear(F.linear(x[..., : A.shape[1]], A), B)
    return (channels.unsqueeze(-1) * kernel).flatten(-2)


def pad_to(width: int, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n width"]:
    """Zeros behind the last dimension, up to `width`."""
    return F.pad(x, (0, width - x.shape[-1]))
