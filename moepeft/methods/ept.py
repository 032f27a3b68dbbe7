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
The factors of all scales stand side by side: one product down, one up. With g the greatest common divisor of the
scales, A (x) I_s = (A (x) I_{s / g}) (x) I_g: the features of each residue mod g are multiplied by the same, g times
smaller factor, which saves g - 1 of g operations. The experts of one scale share factors, and their kernels add up,
weighed by the gates, before they multiply; in the rank space all scales are one block-diagonal kernel per row.

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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moepeft.config import MethodConfig
from moepeft.context import SiteContext
from moepeft.errors import ConfigError, Unsupported
from moepeft.methods._contrastive import ContrastiveTerm, contrastive_task_loss, record_contrastive, with_summary
from moepeft.methods._fast.ept import Apart, Places, add_channel_update, add_kronecker_update, branches, places
from moepeft.methods._validation import check_choices, check_count, check_dropout, check_positive
from moepeft.ops.draws import normal, uniform
from moepeft.ops.gates import top_k_gates
from moepeft.ops.linear import first_position
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class EPT(MethodConfig):
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
        seed_init: start of A and B; zero is that of B alone, and needs kernels that do not start at zero.
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
    # Of the paper's table; its EPT-2468 is the published preset. Without the pruner the seeds would be cropped instead
    # of sliced, which is the same: what remains of it is the dimension factor. Were A and B both zero nothing would
    # ever train: as in LoRA, B alone is.
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "zero_seed": {"seed_init": "zero", "kernel_init": "uniform"},
        "no_top_k": {"top_k": 8},
        "no_pruner": {"dimension_scale": False},
        "no_contrastive": {"contrastive": 0.0},
        "kernels_2": {"kernels": (2,) * 8},
        "kernels_4": {"kernels": (4,) * 8},
        "kernels_8": {"kernels": (8,) * 8},
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
    seed_init: Literal["normal", "uniform", "zero"] = "normal"
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
        if self.seed_init == self.kernel_init == "zero":
            raise ConfigError(
                "EPT: with seed_init='zero' and kernel_init='zero' no gradient is ever other than zero; "
                "let one of them start at random, e.g. kernel_init='uniform'"
            )
        check_choices("EPT", self)
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
            identity_at_init="zero" in (self.kernel_init, self.seed_init),
            aux_losses=("contrastive",) if self.contrastive else (),
            never_trained=untrained,
        )

    @property
    def scales(self) -> tuple[int, ...]:
        """The distinct kernel sizes, ascending."""
        return tuple(sorted(set(self.kernels)))

    @property
    def common_scale(self) -> int:
        """Greatest common divisor g of the kernel sizes."""
        return math.gcd(*self.kernels)

    def select(self, sites: Sequence[LinearSite]) -> Sequence[LinearSite]:
        """Every site whose sides are at least as wide as the largest kernel.

        Raises:
            Unsupported: there is none.
        """
        chosen = [site for site in sites if min(site.in_features, site.out_features) >= max(self.kernels)]
        if not chosen:
            raise Unsupported(
                f"EPT's largest kernel {max(self.kernels)} does not fit site {sites[0].name!r} of shape "
                f"{sites[0].in_features} -> {sites[0].out_features}, nor any other: choose smaller kernels"
            )
        return chosen

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """Seed, kernels, router and task table of one site."""
        return EPTAdapter(site, self)

    def with_experts(self, number: int) -> Self:
        """The pyramid's kernel sizes, each once and over again, until there are `number` of them."""
        distinct = tuple(dict.fromkeys(self.kernels))
        kernels = tuple(islice(cycle(distinct), number))
        return replace(self, kernels=kernels, top_k=min(self.top_k, number))

    def count(self, sites: Sequence[LinearSite]) -> int:
        """Per site: r (in + out) / s_min, the kernels, E in (and E for a bias) for the gate, T in for the table."""
        total = 0
        for site in sites:
            i, o, smallest = site.in_features, site.out_features, min(self.kernels)
            total += self.rank * (i // smallest + o // smallest)
            total += sum(s * s if self.operator == "kronecker" else (o // s) * s for s in self.kernels)
            total += len(self.kernels) * (i + self.gate_bias) + self.num_tasks * i
        return total

    def aux_loss(self, name: str, terms: Sequence[ContrastiveTerm]) -> Tensor:
        """Coefficient times the mean over sites."""
        return self.contrastive * contrastive_task_loss(terms, self.temperature)


class EPTAdapter(nn.Module):
    """Seed A (r, in // s_min), B (out // s_min, r); per scale its experts' kernels (experts, s or out // s, s)."""

    def __init__(self, site: LinearSite, config: EPT) -> None:
        super().__init__()
        self.config = config
        self.in_features, self.out_features = site.in_features, site.out_features
        self.scale = config.alpha / config.rank
        i, o, r = site.in_features, site.out_features, config.rank
        smallest = min(config.kernels)
        draw = uniform if config.seed_init == "uniform" else normal
        self.A = nn.Parameter(draw((r, i // smallest), (i // smallest) ** -0.5))
        self.B = nn.Parameter(draw((o // smallest, r), 0.0 if config.seed_init == "zero" else r**-0.5))
        bound = o**-0.5 if config.kernel_init == "uniform" else 0.0
        self.kernels = nn.ParameterList(
            nn.Parameter(uniform((config.kernels.count(s), s if config.operator == "kronecker" else o // s, s), bound))
            for s in config.scales
        )
        by_scale = sorted(range(len(config.kernels)), key=config.kernels.__getitem__)
        in_order = by_scale == list(range(len(by_scale)))
        self.register_buffer("by_scale", None if in_order else torch.tensor(by_scale), persistent=False)
        self.task_embedding = nn.Parameter(normal((config.num_tasks, i), 0.01))
        self.gate = nn.Linear(i, len(config.kernels), bias=config.gate_bias)
        widest = o // smallest
        factors = [(o // s) / widest if config.dimension_scale else 1.0 for s in config.kernels]
        self.register_buffer("expert_scale", self.scale * torch.tensor(factors), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        if config.operator == "kronecker":
            kernels, widths = [(config.kernels.count(s), s) for s in config.scales], (i, o)
            where = places(kernels, r, (i // smallest, o // smallest), widths, config.common_scale)
            for name, indices in where._asdict().items():
                self.register_buffer(f"places_{name}", indices, persistent=False)

    by_scale: Tensor | None
    expert_scale: Tensor

    def expert_weights(self, routed: Float[Tensor, "*n i"]) -> Float[Tensor, "*n experts"]:
        """Gates of what is routed (task embeddings or tokens): zero but for the top k; no dimension factor yet."""
        with torch.autocast(device_type=routed.device.type, enabled=False):
            logits = self.gate(routed.to(self.gate.weight.dtype))
        heat = self.config.router_temperature
        return self.gates(logits if heat == 1 else logits / heat)

    def gates(self, logits: Float[Tensor, "*n experts"]) -> Float[Tensor, "*n experts"]:
        """Gates from the router's logits."""
        if self.config.gates == "double_softmax":
            return top_k_gates(logits.softmax(dim=-1), self.config.top_k)
        return top_k_gates(logits, self.config.top_k)

    def update(self, x: Float[Tensor, "rows *n i"], gates: Tensor) -> Float[Tensor, "rows *n o"]:
        """Sum over experts of gate times W_e x; gates are (rows, experts) or (rows, *n, experts)."""
        nothing = x.new_zeros(*x.shape[:-1], self.out_features)
        channel = self.config.operator == "channel"
        return self._add_update(
            nothing, Apart(x) if channel else branches(x, gates, self.config.common_scale)[1], gates
        )

    def _branches(self, x: Tensor, gates: Tensor, ctx: SiteContext) -> tuple[Tensor, Apart, Tensor | None]:
        """What the frozen layer, the update and, if there is one, the loss read of the input."""
        if self.config.operator == "channel":
            x, summary = with_summary(x, ctx, self.config.anchor) if self._wants_loss else (x, None)
            return x, Apart(x), summary
        shares = ctx.token_shares(x) if self._wants_loss and self.config.anchor == "mean" else None
        for_base, for_update, mean = branches(x, gates, self.config.common_scale, shares)
        return for_base, for_update, first_position(x) if self._wants_loss and shares is None else mean

    def _add_update(self, y: Tensor, apart: Apart, gates: Tensor) -> Tensor:
        weights = gates * self.expert_scale
        if self.by_scale is not None:
            weights = weights.index_select(-1, self.by_scale)
        if self.config.operator == "channel":
            return add_channel_update(y, apart.features, weights, self.A, self.B, list(self.kernels))
        where = Places(*(getattr(self, f"places_{name}") for name in Places._fields))
        return add_kronecker_update(y, apart, weights, self.A, self.B, list(self.kernels), where)

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus the chosen experts' updates."""
        tasks = ctx.tasks(x.shape[0]) if self.config.routing == "task" or self._wants_loss else None
        if self.config.routing == "token":
            gates = self.expert_weights(x)
        else:
            assert tasks is not None
            gates = self.expert_weights(self.task_embedding).index_select(0, tasks)
        ctx.stat("gates", gates)
        # Made once for q, k and v.
        for_base, apart, summary = ctx.of_input("branches", x, lambda: self._branches(x, gates, ctx))
        if summary is not None:
            assert tasks is not None
            record_contrastive(ctx, summary, self.task_embedding, tasks)
        if self.training and self.dropout.p:  # before or after features are sorted is the same
            apart = Apart(self.dropout(apart.features))
        return self._add_update(base(for_base), apart, gates)

    @property
    def _wants_loss(self) -> bool:
        return self.training and self.config.contrastive > 0

    def delta_weight(self, task: int | None) -> Float[Tensor, "o i"]:
        """The task's update as a matrix: what `update` does to the unit vectors."""
        assert task is not None
        gates = self.expert_weights(self.task_embedding[task])
        eye = torch.eye(self.in_features, device=self.A.device, dtype=self.A.dtype)
        return self.update(eye[None], gates[None])[0].T
