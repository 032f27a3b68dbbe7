"""TuckA: a Tucker tensor of small experts that corrects the input of every layer, routed once per batch.

Paper: Lei et al., TuckA: Hierarchical Compact Tensor Experts for Efficient Fine-Tuning, arXiv 2511.06859 (AAAI 2026).
Release: LQF39466/TuckA, commit 15a471dd (no licence: computed anew, nothing copied).

    per site: core G (k, p, r, r), factor U (in, r), mixing C (t, p); k groups of t experts each
    routing, once per forward: xbar = mean input of the first site, l = EC xbar as (k, t) with centroids EC (k t, in),
        s = sigmoid(l / |l| group by group), one group j wins, its scores w = s[j] weigh its t experts
    expert i of group j is the slice i of the Tucker tensor G[j] x1 C x2 U x3 U; their weighted sum is
        T = U M U^T,   M = sum_i w_i sum_q C[i, q] G[j, q]
    y = base(x + alpha x T)           G[j], U, C divided by their Frobenius norms

`dense_update` is T, written with tensorly; `correct_input` is what reaches the frozen layer. The fast path never builds
T but multiplies from the left.

Differences between paper and release (preset `released` reproduces those that change numbers):
* the release averages xbar over padding as well: ``mean="all"``; here over real tokens;
* it picks the group by the normalised scores, so that the most uneven group wins however weak its affinity:
  ``choice="normalised"``; here the group with the largest affinity wins;
* it re-routes at every step of cached decoding by one token: ``hold=False``; here the prompt's routing holds;
* DeBERTa, the release's model for GLUE, sends its table of relative positions through the query projections, and the
  first of them is the router. The release adapts the table and routes by the table from there on:
  ``positions="adapted"``. Only two sites see the batch's routing, the first query and value projections. All others
  use the weights that the table gives, which are the same for every batch. Here the table is left alone;
* it re-draws trained centroids after a reload, because "already initialised" is not saved: not reproduced.

Routing by batch makes a row depend on its companions. ``routing="row"`` is this library's variant without that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moepeft.config import MethodConfig, Recipe
from moepeft.context import SiteContext
from moepeft.errors import ConfigError, Unsupported
from moepeft.fast import has_fast_path
from moepeft.methods._fast import tucka as _fast
from moepeft.methods._released.tucka import PRESETS, RECIPES
from moepeft.methods._validation import check_choices, check_count, check_positive
from moepeft.ops.draws import uniform
from moepeft.ops.linear import row_mean, token_shares
from moepeft.ops.precision import without_autocast
from moepeft.ops.processes import has_processes, one_thread_at_a_time
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class TuckA(MethodConfig):
    """Configuration of TuckA.

    Attributes:
        rank: rank r of the experts.
        groups: number of groups k.
        experts: experts per group t.
        shared_rank: rank p that the experts of a group share.
        alpha: size of the correction (the factors' own sizes are divided out).
        routing: one routing for the whole batch (the method), or one per row.
        centroids: start them from the first batch, or by Kaiming's uniform draw.
        perturbation: half width of the uniform noise around the data-aware start.
        mean: average the router's input over real tokens, or over all positions.
        choice: pick the group by raw affinity, or by the scores normalised within groups.
        hold: keep the prompt's routing during cached decoding.
        positions: leave a table of relative positions (DeBERTa's) alone, or adapt it and route by it as by a batch.
    """

    name: ClassVar[str] = "tucka"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {}, **PRESETS}
    recipes: ClassVar[Mapping[str, Recipe]] = RECIPES
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "kaiming": {"centroids": "kaiming"},
        **{f"groups_{number}": {"groups": number} for number in (1, 4)},
        **{f"experts_{number}": {"experts": number} for number in (1, 4)},
    }
    sizes: ClassVar[tuple[str, ...]] = ("rank", "shared_rank")

    rank: int = 8
    groups: int = 2
    experts: int = 2
    shared_rank: int = 2
    alpha: float = 2.0
    routing: Literal["batch", "row"] = "batch"
    centroids: Literal["data", "kaiming"] = "data"
    perturbation: float = 1.0
    mean: Literal["real", "all"] = "real"
    choice: Literal["affinity", "normalised"] = "affinity"
    hold: bool = True
    positions: Literal["frozen", "adapted"] = "frozen"

    def __post_init__(self) -> None:
        for field in ("rank", "groups", "experts", "shared_rank"):
            check_count("TuckA", field, getattr(self, field))
        check_positive("TuckA", "alpha", self.alpha)
        check_positive("TuckA", "perturbation", self.perturbation, zero=True)
        check_choices("TuckA", self)
        if self.positions == "adapted" and self.mean == "real":
            raise ConfigError(
                "TuckA: positions='adapted' with mean='real', but a table of positions has no padding: take mean='all'"
            )

    @property
    def capabilities(self) -> Capabilities:
        """Never mergeable; depends on batch companions when routed by batch, and on padding when it is averaged in."""
        return Capabilities(
            routing="batch",
            not_mergeable="its update is chosen and weighed by the mean input of each batch",
            identity_at_init=False,
            row_independent=self.routing == "row",
            padding_independent=self.mean == "real",
            cache_consistent=False,
            adapts_positions=self.positions == "adapted",
        )

    def shared(self, sites: Sequence[LinearSite]) -> nn.Module:
        """The router: centroids as wide as the first site's input, and sites stand in the order of their calls."""
        return Router(sites[0], self)

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """Core and factors of one site."""
        assert isinstance(shared, Router)
        return TuckAAdapter(site, self, shared)

    def prepare(self, adapters: Sequence[nn.Module], task_sets: Tensor | None) -> Sequence[_fast.Ready]:
        """The experts' matrices, for the fast path."""
        factors = [adapter.factors() for adapter in adapters if isinstance(adapter, TuckAAdapter)]
        return _fast.make_ready(factors, self.alpha)

    def with_experts(self, number: int) -> Self:
        """`number` experts in every group."""
        return replace(self, experts=number)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """k p r^2 + r in + t p per site, and k t in of the first site for the centroids."""
        r, k, t, p = self.rank, self.groups, self.experts, self.shared_rank
        return sum(k * p * r * r + r * site.in_features + t * p for site in sites) + k * t * sites[0].in_features


class Routing(NamedTuple):
    """What was chosen: where, the winning group of each row, its experts' weights, and the gates of all experts."""

    site: str
    group: Int[Tensor, "rows"]
    weights: Float[Tensor, "rows t"]
    gates: Float[Tensor, "rows kt"]


class Router(nn.Module):
    """Centroids EC (k t, in) and the choice they make. Every site reads its result."""

    KEY = "tucka.routing"
    initialised: Tensor

    def __init__(self, site: LinearSite, config: TuckA) -> None:
        super().__init__()
        self.config = config
        size = (config.groups * config.experts, site.in_features)
        self.centroids = nn.Parameter(uniform(size, (6 / site.in_features) ** 0.5))
        self.register_buffer("initialised", torch.tensor(config.centroids == "kaiming"))
        self._ready = config.centroids == "kaiming"

    def route(self, x: Tensor, ctx: SiteContext) -> None:
        """At the first site of this forward, choose group and weights from its input and leave them for every site.

        Which site is the first is seen, not known: the code of the model may call its layers in another order.

        Raises:
            Unsupported: its input is not as wide as the centroids.
        """
        left = ctx.get(self.KEY)
        if left is not None:
            again = ctx.recomputes or (not self.config.hold and ctx.continues)
            again = again or self.config.positions == "adapted"  # the table of positions is routed by as well
            if not (again and left.site == ctx.site.name):
                return
        if x.shape[-1] != self.centroids.shape[1]:
            raise Unsupported(
                f"TuckA routes by the input of the first adapted layer to run, whose width it took to be "
                f"{self.centroids.shape[1]}, but {ctx.site.name!r} of width {x.shape[-1]} runs first: leave it out by "
                f"attach(exclude=[{ctx.site.name!r}])"
            )
        mask = ctx.mask(x, given=self.config.mean == "all")  # what the user leaves out is never read
        rows = row_mean(x, token_shares(x, mask)) if self.config.routing == "row" else _batch_mean(x, mask)
        rows = rows.to(self.centroids.dtype)
        if ctx.synchronised and self.training and self.config.routing == "batch":
            positions = x[..., 0].numel() if mask is None else mask.sum()
            totals = ctx.joint_sum(F.pad(rows, (0, 1), value=1.0) * positions)
            rows = totals[:, :-1] / totals[:, -1:].clamp(min=1)
        # From no tokens nothing can start. With several processes all must take part, whatever their own batches hold.
        if not (self._ready or x.is_meta) and (x.numel() or has_processes()):
            self._start(rows)
        ctx.put(self.KEY, Routing(ctx.site.name, *self(rows)))

    def forward(self, rows: Float[Tensor, "rows i"]) -> tuple[Tensor, Tensor, Tensor]:
        """`Routing.group`, `weights` and `gates` of each row."""
        with without_autocast(rows):
            shape = self.config.groups, self.config.experts
            affinity = torch.unflatten(F.linear(rows, self.centroids), -1, shape)
            scores = F.normalize(affinity, dim=-1, eps=1e-12).sigmoid()
        deciding = affinity if self.config.choice == "affinity" else scores
        group = deciding.amax(dim=-1).argmax(dim=-1)
        index = group.view(-1, 1, 1).expand(-1, 1, self.config.experts)
        weights = scores.gather(1, index)
        winner = F.one_hot(group, self.config.groups).to(weights.dtype).unsqueeze(-1)
        return group, weights.squeeze(1), (winner * weights).flatten(1)

    @one_thread_at_a_time
    @torch.no_grad()
    def _start(self, rows: Tensor) -> None:
        """Data-aware start: the first centroid is the first batch's mean, the others are near it."""
        if not bool(self.initialised):  # read once: afterwards `_ready` answers without touching the device
            mean = rows.mean(dim=0)
            noise = 2 * torch.rand_like(self.centroids[1:]) - 1
            self.centroids.copy_(torch.cat((mean[None], mean + self.config.perturbation * noise)))
            if has_processes():
                # Every process has seen another batch; all must go on from the same centroids.
                dist.broadcast(self.centroids.detach(), src=0)
            self.initialised.fill_(True)
        self._ready = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ready = False
        super()._load_from_state_dict(*args, **kwargs)


def _batch_mean(x: Tensor, mask: Tensor | None) -> Float[Tensor, "1 i"]:
    if mask is None:
        tokens = x.flatten(0, -2)
        return tokens.mean(dim=0, keepdim=True) if len(tokens) else tokens.sum(dim=0, keepdim=True)
    weight = mask.to(x.dtype)
    return torch.einsum("bs,bsd->d", weight, x.flatten(1, -2))[None] / weight.sum().clamp(min=1)


def dense_update(
    core: Float[Tensor, "p r r"],
    factor: Float[Tensor, "i r"],
    mixing: Float[Tensor, "t p"],
    weights: Float[Tensor, "t"],
) -> Float[Tensor, "i i"]:
    """T = U M U^T as a Tucker product: the experts are slices of core x1 C x2 U x3 U, here summed with `weights`.

    Costs in^2 memory. Needs the package `tensorly`, which no fast path needs.
    """
    import tensorly  # of the extra `tucker`; the fast path does without
    from tensorly.tenalg import multi_mode_dot

    unit_core, unit_factor, unit_mixing = (tensor / tensor.norm() for tensor in (core, factor, mixing))
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        slices = multi_mode_dot(unit_core, [unit_mixing, unit_factor, unit_factor], modes=[0, 1, 2])
        update: Tensor = multi_mode_dot(slices, [weights], modes=[0])
        return update


class Factors(NamedTuple):
    """The parameters of a site: core G, factor U and mixing C; `ready` is what the fast path has made of them."""

    core: Float[Tensor, "k p r r"]
    factor: Float[Tensor, "i r"]
    mixing: Float[Tensor, "t p"]
    ready: tuple[Tensor, Tensor] | None = None


@has_fast_path(_fast.correct_input)
def correct_input(
    x: Float[Tensor, "rows *n i"],
    factors: Factors,
    routing: Routing,
    alpha: float,
) -> Float[Tensor, "rows *n i"]:
    """x + alpha x T, with the T of each routing's group and weights; one routing serves as many rows as there are."""
    updates = [
        dense_update(core, factors.factor, factors.mixing, w).to(x.dtype)
        for core, w in zip(factors.core.index_select(0, routing.group), routing.weights, strict=True)
    ]
    rows = torch.unflatten(x, 0, (len(updates), len(x) // len(updates)))
    return x + alpha * torch.stack([xs @ T for xs, T in zip(rows, updates, strict=True)]).flatten(0, 1)


class TuckAAdapter(nn.Module):
    """Core G (k, p, r, r), factor U (in, r) and mixing C (t, p) of one site."""

    def __init__(self, site: LinearSite, config: TuckA, router: Router) -> None:
        super().__init__()
        r, k, t, p = config.rank, config.groups, config.experts, config.shared_rank
        self.alpha = config.alpha
        # One slice, copied: all groups and experts start as the same map up to a scalar.
        self.core = nn.Parameter(uniform((r, r), r**-0.5).repeat(k, p, 1, 1))
        self.factor = nn.Parameter(uniform((site.in_features, r), site.in_features**-0.5))
        self.mixing = nn.Parameter(uniform((t, p), t**-0.5))
        self._router = (router,)  # in a tuple: the router is registered once, elsewhere

    def fixed_update(self, gates: Float[Tensor, "g"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """alpha W0 T^T, since base(x + alpha x T) = x (W0 + alpha W0 T^T)^T + b where T is the same for every x."""
        return _fast.fixed_update(self.factors(), gates, weight, self.alpha)

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output for the corrected input."""
        router = self._router[0]
        router.route(x, ctx)
        routing: Routing = ctx.get(Router.KEY)
        ctx.stat("group", routing.group)
        ctx.stat("scores", routing.weights)
        ctx.stat("gates", routing.gates)
        number = len(routing.group)
        if number not in (1, x.shape[0]):  # beam search repeated the rows after they were routed
            parts = (ctx.spread(each, x.shape[0], "routings") for each in routing[1:])
            routing = Routing(routing.site, *parts)
        return base(correct_input(x, self.factors(ctx.prepared), routing, self.alpha))

    def factors(self, ready: tuple[Tensor, Tensor] | None = None) -> Factors:
        """The parameters, and what is ready of them."""
        return Factors(self.core, self.factor, self.mixing, ready)
