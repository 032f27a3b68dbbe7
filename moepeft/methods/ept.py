"""EPT: experts of several scales grown from one low-rank seed by deconvolution.

Paper: Zhang, Yan et al., Expert Pyramid Tuning: Efficient Parameter Fine-Tuning for Expertise-Driven Task Allocation,
arXiv 2603.12577 (CVPR 2026).
Release: Yan-Zhenwei/EPT, commit 54ed6edc (no licence: computed anew, nothing copied).

    seed, shared by a site's experts: A (r, in // s_min), B (out // s_min, r), both Gaussian
    expert e with kernel size s: Z_e = B[:out // s] A[:, :in // s]                 the adaptive pruner
                                 W_e = deconv(Z_e; K_e), stride s, K_e (s, s)      zero at the start
    router: logits over experts from the task's embedding (gate (E, in), table (T, in) per site), or from the token
    y = W0 x + (alpha / r) sum over the top k of  g_e (s_e / T) W_e x

A transposed convolution whose stride is its kernel size is a Kronecker product: W_e = Z_e (x) K_e, padded with zeros
where s does not divide a side. So W_e is never built: `expert_update` applies the seed to blocks of s features, and the
kernel inside each block.

A contrastive loss over tasks, averaged over sites, pulls a row's summary towards its task's embedding.

Readings. The notes on the paper that we have write the dimension factor d_t / T and call {2, 2, 4, 4, 6, 6, 8, 8} the
pyramid's dimensions. So d_t is the kernel size and T the number of tasks, and the factor grows with the scale:
``dimension_factor="tasks"``. It is above 1 where there are fewer tasks than a kernel is wide. The opposite order takes
d for the width of the expert's seed, over that of the widest, s_min / s: ``"seed"``. One note takes a softmax over all
experts and keeps the k largest as they are: ``gates="softmax_all"``.

`moepeft.methods._released.ept` lists what the release computes otherwise; the preset `released` reproduces it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from math import prod
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moepeft.config import MethodConfig, Recipe
from moepeft.context import SiteContext
from moepeft.errors import ConfigError, Unsupported
from moepeft.fast import has_fast_path
from moepeft.methods._contrastive import (
    ContrastiveSites,
    ContrastiveTerm,
    contrastive_task_loss,
    gives_term,
    record_contrastive,
    summarise,
)
from moepeft.methods._fast import ept as _fast
from moepeft.methods._prepared import Prepared, Site, prepare_sites
from moepeft.methods._pyramid import Definition, Once, Pyramid, add_experts
from moepeft.methods._released import ept as _released
from moepeft.methods._task_gates import Gates, expert_gates
from moepeft.methods._validation import check_choices, check_count, check_dropout, check_positive
from moepeft.ops.draws import normal, uniform
from moepeft.ops.linear import dropout_of
from moepeft.ops.precision import without_autocast
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class EPT(MethodConfig):
    """Configuration of EPT.

    Attributes:
        rank: rank r of the seed.
        alpha: numerator of the scale alpha / r.
        kernels: kernel size of each expert. Their order means nothing, and the configuration keeps them ascending.
        top_k: experts per task (or token).
        num_tasks: number of tasks T.
        routing: route by the task's embedding (mergeable), or by each token.
        router_temperature: divides the router's logits.
        gates: softmax over the chosen logits; of the chosen probabilities, as the release; over all logits.
        gate_bias: whether the gate has a bias.
        operator: the equations' deconvolution of the seed, or the release's of the activations.
        kernel_init: start of the kernels.
        seed_init: start of A and B; zero is that of B alone, and needs kernels that do not start at zero.
        seed_width: of A and B: in and out over the smallest kernel, or half of them, as the release.
        dimension_factor: s / T, s_min / s, or none.
        factor_tasks: T of s / T; None: `num_tasks`.
        contrastive: coefficient of the contrastive loss.
        contrastive_sites: which sites give a term to it; the loss is their mean.
        temperature: its temperature.
        anchor: a row's summary in it: mean over real tokens, or position 0.
        dropout: probability of dropping an input feature of the adapter while training.
    """

    name: ClassVar[str] = "ept"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {}, "released": _released.PRESET}
    recipes: ClassVar[Mapping[str, Recipe]] = _released.RECIPES
    # Of the paper's table, whose EPT-2468 is the published preset, and the readings. Without the pruner seeds would be
    # cropped in place of sliced, which is the same. Were A and B both zero nothing would train: as in LoRA, B alone is.
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "zero_seed": {"seed_init": "zero", "kernel_init": "uniform"},
        "no_top_k": {"top_k": 8},
        "factor_seed": {"dimension_factor": "seed"},
        "no_factor": {"dimension_factor": "none"},
        "gates_all": {"gates": "softmax_all"},
        "gates_double": {"gates": "double_softmax"},
        "no_contrastive": {"contrastive": 0.0},
        **{f"kernels_{s}": {"kernels": (s,) * 8} for s in (2, 4, 8)},
    }

    rank: int = 8
    alpha: float = 32.0
    kernels: tuple[int, ...] = (2, 2, 4, 4, 6, 6, 8, 8)
    top_k: int = 2
    num_tasks: int = 1
    routing: Literal["task", "token"] = "task"
    router_temperature: float = 1.0
    gates: Gates = "softmax"
    gate_bias: bool = False
    operator: Literal["kronecker", "channel"] = "kronecker"
    kernel_init: Literal["zero", "uniform"] = "zero"
    seed_init: Literal["normal", "uniform", "zero"] = "normal"
    seed_width: Literal["smallest_kernel", "half"] = "smallest_kernel"
    dimension_factor: Literal["tasks", "seed", "none"] = "tasks"
    contrastive: float = 0.1
    contrastive_sites: ContrastiveSites = "all"
    temperature: float = 0.05
    anchor: Literal["mean", "first"] = "mean"
    dropout: float = 0.0
    factor_tasks: int | None = None

    def __post_init__(self) -> None:
        for field in ("rank", "num_tasks", *(("factor_tasks",) if self.factor_tasks is not None else ())):
            check_count("EPT", field, getattr(self, field))
        if not self.kernels:
            raise ConfigError("EPT: kernels is empty, wanted the kernel size of every expert, e.g. (2, 2, 4, 4)")
        for size in self.kernels:
            check_count("EPT", "kernels", size, low=2 if self.seed_width == "half" else 1)
        object.__setattr__(self, "kernels", tuple(sorted(self.kernels)))
        check_count("EPT", "top_k", self.top_k, high=len(self.kernels), hint="there are as many experts as kernels")
        for field in ("alpha", "router_temperature", "temperature"):
            check_positive("EPT", field, getattr(self, field))
        check_positive("EPT", "contrastive", self.contrastive, zero=True)
        if self.seed_init == self.kernel_init == "zero":
            zero = "seed_init='zero' and kernel_init='zero'"
            raise ConfigError(f"EPT: with {zero} no gradient is ever other than zero; choose kernel_init='uniform'")
        check_choices("EPT", self)
        check_dropout("EPT", self.dropout)

    @property
    def capabilities(self) -> Capabilities:
        """Routed by task it merges per task; routed by token it cannot."""
        untrained: tuple[str, ...] = ()
        if self.routing == "token" and not self.contrastive:
            untrained = ("task_embedding",)
        elif self.routing == "task" and self.top_k == 1 and self.gates != "softmax_all":
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
    def seed_divisor(self) -> int:
        """What the widths of a site are divided by for those of its seed."""
        return 2 if self.seed_width == "half" else min(self.kernels)

    @property
    def factors(self) -> tuple[float, ...]:
        """f_e of every scale: alpha / r times the dimension factor."""
        scale, smallest, T = self.alpha / self.rank, self.scales[0], self.factor_tasks or self.num_tasks
        readings = ({"tasks": s / T, "seed": smallest / s, "none": 1.0} for s in self.scales)
        return tuple(scale * of_scale[self.dimension_factor] for of_scale in readings)

    @property
    def definition(self) -> Definition:
        """What an expert is."""
        return _released.DEFINITION if self.operator == "channel" else PUBLISHED

    def select(self, sites: Sequence[LinearSite]) -> Sequence[LinearSite]:
        """Every site whose sides are at least as wide as the largest kernel; `Unsupported` if there is none."""
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

    @property
    def expert_sizes(self) -> tuple[float, ...]:
        """The kernel size of every expert."""
        return self.kernels

    def with_experts(self, number: int) -> Self:
        """The pyramid's kernel sizes, each once and over again, until there are `number` of them."""
        return replace(self, kernels=tuple(islice(cycle(self.scales), number)), top_k=min(self.top_k, number))

    def count(self, sites: Sequence[LinearSite]) -> int:
        """Per site: r (in + out) / s_min, the kernels, E in (and E for a bias) for the gate, T in for the table."""
        total, divisor = 0, self.seed_divisor
        for i, o in ((site.in_features, site.out_features) for site in sites):
            total += self.rank * (i // divisor + o // divisor)
            total += sum(prod(self.definition.kernel_shape(s, o)) for s in self.kernels)
            total += len(self.kernels) * (i + self.gate_bias) + self.num_tasks * i
        return total

    def prepare(self, adapters: Sequence[nn.Module], task_sets: Tensor | None) -> Sequence[Prepared]:
        """Gates of the call's rows, and for the fast path what the experts' parameters become."""
        tasks = None if task_sets is None or task_sets.shape[1] != 1 else task_sets[:, 0]
        return prepare_sites([each for each in adapters if isinstance(each, EPTAdapter)], tasks, self)

    def aux_loss(self, name: str, terms: Sequence[ContrastiveTerm]) -> Tensor:
        """Coefficient times the mean over sites."""
        return self.contrastive * contrastive_task_loss(terms, self.temperature)


# ---------------------------------------------------------------------- definition


def expert_update(
    x: Float[Tensor, "rows *n i"],
    A: Float[Tensor, "r i_s"],
    B: Float[Tensor, "o_s r"],
    K: Float[Tensor, "rows *m s s"],
    out_features: int,
) -> Float[Tensor, "rows *n o"]:
    """W_e x for W_e = Z_e (x) K, Z_e = B[:out // s] A[:, :in // s]; K is one kernel per row, or per token."""
    s = K.shape[-1]
    h, w = out_features // s, x.shape[-1] // s  # the adaptive pruner
    blocks = x[..., : w * s].reshape(*x.shape[:-1], w, s)
    low = torch.einsum("...ws,rw->...rs", blocks, A[:, :w])
    mixed = torch.einsum("...rs,...ts->...rt", low, K)
    grown = torch.einsum("...rt,hr->...ht", mixed, B[:h])
    return F.pad(grown.flatten(-2), (0, out_features - h * s))


@has_fast_path(_fast.add_pyramid, compiled=False)
def add_pyramid(y: Tensor, x: Tensor, gates: Tensor, pyramid: Pyramid, once: Once | None = None) -> Tensor:
    """`add_experts` of `expert_update`; `once` is `SiteContext.of_input`, for what a fast path makes of x alone."""
    return add_experts(expert_update, y, x, gates, pyramid)


PUBLISHED = Definition(lambda s, out_features: (s, s), add_pyramid, _fast.make_ready)


# ---------------------------------------------------------------------- adapter


class EPTAdapter(Site):
    """Seed A (r, in // s_min), B (out // s_min, r); per scale its experts' kernels (experts, *kernel_shape)."""

    def __init__(self, site: LinearSite, config: EPT) -> None:
        super().__init__()
        self.config, self.in_features, self.out_features = config, site.in_features, site.out_features
        i, o, r = site.in_features, site.out_features, config.rank
        i_s, o_s = (width // config.seed_divisor for width in (i, o))
        draw = uniform if config.seed_init == "uniform" else normal
        self.A = nn.Parameter(draw((r, i_s), i_s**-0.5))
        self.B = nn.Parameter(draw((o_s, r), 0.0 if config.seed_init == "zero" else r**-0.5))
        bound = o**-0.5 if config.kernel_init == "uniform" else 0.0
        self.kernels = nn.ParameterList(
            nn.Parameter(uniform((config.kernels.count(s), *config.definition.kernel_shape(s, o)), bound))
            for s in config.scales
        )
        self.task_embedding = nn.Parameter(normal((config.num_tasks, i), 0.01))
        self.gate = nn.Linear(i, len(config.kernels), bias=config.gate_bias)
        self.factors, self.gives_term = config.factors, gives_term(config, site)
        self.input_is_kept = site.role == "o"  # by attention, whose output it is
        self.dropout = dropout_of(config.dropout)

    def route(self, routed: Float[Tensor, "*n i"]) -> Float[Tensor, "*n experts"]:
        """Gates of what is routed (task embeddings or tokens): zero but for the top k."""
        with without_autocast(routed):
            return self.choose(self.gate(routed.to(self.gate.weight.dtype)))

    def choose(self, logits: Float[Tensor, "*n experts"]) -> Float[Tensor, "*n experts"]:
        """Gates of the router's logits."""
        divisor = self.config.router_temperature
        return expert_gates(logits if divisor == 1 else logits / divisor, self.config.top_k, self.config.gates)

    def pyramid(self) -> Pyramid:
        """What the experts are made of."""
        kernels = [K for K in self.kernels._parameters.values() if K is not None]  # indexing takes ten times as long
        return Pyramid(self.A, self.B, kernels, self.factors, None, self.input_is_kept)

    def add_update(
        self, y: Tensor, x: Tensor, gates: Tensor, once: Once | None = None, pyramid: Pyramid | None = None
    ) -> Float[Tensor, "rows *n o"]:
        """y plus the gated experts' updates; gates are (rows, experts), or (rows, *n, experts) of tokens."""
        return self.config.definition.add_update(y, x, gates, pyramid or self.pyramid(), once)

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus the chosen experts' updates."""
        wants_loss, rows = self.training and self.gives_term, x.shape[0]
        tasks = ctx.tasks(rows) if self.config.routing == "task" or wants_loss else None
        prepared: Prepared = ctx.prepared or prepare_sites([self], tasks, self.config)[0]
        made = prepared.spread(rows, ctx)
        gates = self.route(x) if made.gates is None else made.gates
        if tasks is not None and wants_loss:
            table = self.task_embedding.clone() if made.table is None else made.table
            record_contrastive(ctx, summarise(x, ctx, self.config.anchor), table, tasks)
        ctx.stat("gates", gates)
        return self.add_update(base(x), self.dropout(x), gates, ctx.of_input, made.pyramid)

    def delta_weight(self, task: int | None) -> Float[Tensor, "o i"]:
        """The task's update as a matrix: what `add_update` adds for the unit vectors."""
        assert task is not None
        gates, x = self.route(self.task_embedding[task]), torch.eye(self.in_features).to(self.A)
        return self.add_update(x.new_zeros(1, self.in_features, self.out_features), x[None], gates[None])[0].T
