"""MoRE: one LoRA whose rank depends on the task.

Paper: Zhang et al., MoRE: A Mixture of Low-Rank Experts for Adaptive Multi-Task Learning, arXiv 2505.22694.
Release: NLPfreshman0/MoRE, commit b31d8feb (no licence: computed anew, nothing copied).

    p_t = softmax(G e_t + c)          G (E, in), c (E), task table e (T, in); all per site; E = r ranks to choose from
    m_t = argmax p_t                  the rank that task t uses, counted from 1
    s_t = p_t[m_t] - stop_gradient(p_t[m_t]) + 1      is 1 and passes the task's gradient to the selector
    y = W0 x + (alpha / r) s_t (m_t / |T|) B[:, :m_t] A[:m_t] x

Rows use different ranks through weights of the rank-one terms, zero above a row's rank. A contrastive loss pulls a
row's summary towards its task's embedding.

Readings of the factor. The notes on the paper that we have write r_t / |T|: ``scaling="tasks"``, the default, because
it is the equation. In the paper's setting r and |T| are both 8, where m / r is the same: ``scaling="rank"``. The two
differ elsewhere: m / r stays between 1 / r and 1, m / |T| grows with the rank and falls with the number of tasks.

Differences between paper and release (preset `released` reproduces those that change numbers):
* the selector never trains in the release: the map from task to rank is frozen at the first forward, a draw made by
  the initialisation: ``selector="frozen"``. Here the frozen map is saved, so that it survives a reload;
* the release has eight ranks to choose from whatever r is: ``rank_experts=8``. Ranks above r use all r terms, terms
  above the eighth are never used;
* the release weighs term k by (k / 8)^2 whatever the rank and the number of tasks: ``scaling="eighths"``;
* the release summarises a row by position 0 (the task's name in its prompts): ``anchor="first"``; the mean over real
  tokens is the default here;
* the release's contrastive loss is 0.1 times the mean over the encoder's sites: ``contrastive_sites="encoder"``. The
  decoder's terms are dropped there. The release divides by 72, a literal: the number of encoder sites of T5-base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moepeft.config import MethodConfig, Recipe
from moepeft.context import SiteContext
from moepeft.methods._contrastive import (
    ContrastiveSites,
    ContrastiveTerm,
    contrastive_task_loss,
    gives_term,
    record_contrastive,
    summarise,
)
from moepeft.methods._released.more import RECIPES, FrozenChoice
from moepeft.methods._task_gates import Selector, route_rows
from moepeft.methods._validation import check_choices, check_count, check_dropout, check_positive
from moepeft.ops.draws import normal, uniform
from moepeft.ops.linear import add_linear, computing_type, dropout_of, per_row
from moepeft.ops.precision import without_autocast
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class MoRE(MethodConfig):
    """Configuration of MoRE.

    Attributes:
        rank: largest rank r.
        rank_experts: number of ranks E to choose from, 1 to E; None: r of them.
        alpha: numerator of the scale alpha / r.
        num_tasks: number of tasks T.
        selector: train the choice of ranks, or freeze it at the first forward.
        scaling: factor of the update by rank: m_t / |T|, m_t / r, (k / 8)^2 on its k-th term, or none.
        contrastive: coefficient of the contrastive loss.
        contrastive_sites: which sites give a term to it; the loss is their mean.
        temperature: its temperature.
        anchor: a row's summary in it: mean over real tokens, or position 0.
        dropout: probability of dropping an input feature of the adapter while training.
        factor_tasks: |T| of the factor m_t / |T|; None: `num_tasks`.
    """

    name: ClassVar[str] = "more"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "released": {
            "rank_experts": 8,
            "selector": "frozen",
            "scaling": "eighths",
            "contrastive_sites": "encoder",
            "anchor": "first",
            "dropout": 0.1,
        },
    }
    recipes: ClassVar[Mapping[str, Recipe]] = RECIPES
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "factor_rank": {"scaling": "rank"},
        "no_factor": {"scaling": "none"},
        "no_contrastive": {"contrastive": 0.0},
    }

    rank: int = 8
    rank_experts: int | None = None
    alpha: float = 32.0
    num_tasks: int = 1
    selector: Literal["trained", "frozen"] = "trained"
    scaling: Literal["tasks", "rank", "eighths", "none"] = "tasks"
    contrastive: float = 0.1
    contrastive_sites: ContrastiveSites = "all"
    temperature: float = 0.05
    anchor: Literal["mean", "first"] = "mean"
    dropout: float = 0.0
    factor_tasks: int | None = None

    def __post_init__(self) -> None:
        check_count("MoRE", "rank", self.rank)
        if self.factor_tasks is not None:
            check_count("MoRE", "factor_tasks", self.factor_tasks)
        check_count("MoRE", "num_tasks", self.num_tasks)
        if self.rank_experts is not None:
            check_count("MoRE", "rank_experts", self.rank_experts)
        check_positive("MoRE", "alpha", self.alpha)
        check_positive("MoRE", "contrastive", self.contrastive, zero=True)
        check_positive("MoRE", "temperature", self.temperature)
        check_choices("MoRE", self)
        check_dropout("MoRE", self.dropout)

    @property
    def expert_sizes(self) -> tuple[float, ...]:
        """The rank that every expert uses."""
        return tuple(range(1, self.choices + 1))

    @property
    def capabilities(self) -> Capabilities:
        """Routes by task, so it merges per task; a frozen selector gets no gradient."""
        never = ("gate.weight", "gate.bias") if self.selector == "frozen" else ()
        if self.selector == "frozen" and not self.contrastive:
            never = (*never, "task_embedding")
        return Capabilities(
            routing="task", aux_losses=("contrastive",) if self.contrastive else (), never_trained=never
        )

    @property
    def choices(self) -> int:
        """The number E of ranks to choose from."""
        return self.rank if self.rank_experts is None else self.rank_experts

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """The factors, the selector and the task table of one site."""
        return MoREAdapter(site, self) if self.selector == "trained" else FrozenMoREAdapter(site, self)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """r (in + out) + E (in + 1) + T in."""
        return sum(
            self.rank * (site.in_features + site.out_features)
            + self.choices * (site.in_features + 1)
            + self.num_tasks * site.in_features
            for site in sites
        )

    def aux_loss(self, name: str, terms: Sequence[ContrastiveTerm]) -> Tensor:
        """Coefficient times the mean over sites."""
        return self.contrastive * contrastive_task_loss(terms, self.temperature)

    def prepare(self, adapters: Sequence[nn.Module], task_sets: Tensor | None) -> Sequence[tuple[Tensor, Tensor]]:
        """What trained selectors select for the call's rows; a frozen choice is looked up site by site."""
        if task_sets is None or task_sets.shape[1] != 1 or self.selector == "frozen":
            return ()
        return select_terms([each for each in adapters if isinstance(each, MoREAdapter)], task_sets[:, 0])

    def ladder(self) -> tuple[Int[Tensor, "ranks r"], float]:
        """Weight of term k at rank m, in row m - 1 and column k - 1: whole numbers, exact in every type; their unit."""
        term = torch.arange(1, self.rank + 1)
        rank = torch.arange(1, self.choices + 1).unsqueeze(1)
        used = (term <= rank).long()
        if self.scaling == "eighths":
            return used * term.square(), 1 / 64
        if self.scaling == "none":
            return used, 1.0
        return used * rank, 1 / (self.factor_tasks or self.num_tasks if self.scaling == "tasks" else self.rank)


def term_weights(
    p: Float[Tensor, "*sites tasks ranks"], ladder: Int[Tensor, "ranks r"], unit: float
) -> Float[Tensor, "*sites tasks r"]:
    """Weights of the rank-one terms of each task: the rung of the task's likeliest rank m, times s, times `unit`."""
    p_m, m = p.max(dim=-1, keepdim=True)
    s = p_m - p_m.detach() + 1  # straight through
    return s * (ladder * unit).to(p.dtype)[m.squeeze(-1)]


def add_terms(
    y: Float[Tensor, "rows *n o"],
    x: Float[Tensor, "rows *n i"],
    A: Float[Tensor, "r i"],
    B: Float[Tensor, "o r"],
    w: Float[Tensor, "rows r"],
) -> Float[Tensor, "rows *n o"]:
    """y + B diag(w) A x of each row: w is zero above the row's rank m, so that B[:, :m] A[:m] is left."""
    terms = F.linear(x, A.to(x.dtype))
    return add_linear(y, terms * per_row(w, terms), B)


class MoREAdapter(nn.Module):
    """Factors A (r, in), B (out, r), selector gate and task table (T, in) of one site."""

    def __init__(self, site: LinearSite, config: MoRE) -> None:
        super().__init__()
        self.config = config
        self.scale = config.alpha / config.rank
        self.A = nn.Parameter(uniform((config.rank, site.in_features), site.in_features**-0.5))
        self.B = nn.Parameter(uniform((site.out_features, config.rank), 0.0))
        self.task_embedding = nn.Parameter(normal((config.num_tasks, site.in_features), 0.01))
        self.gate = nn.Linear(site.in_features, config.choices)
        nn.init.uniform_(self.gate.weight, -((6 / site.in_features) ** 0.5), (6 / site.in_features) ** 0.5)
        self.dropout = dropout_of(config.dropout)
        ladder, self.unit = config.ladder()
        self.register_buffer("ladder", ladder, persistent=False)
        self.gives_term = gives_term(config, site)

    ladder: Tensor

    @property
    def selector(self) -> Selector:
        """What selects the ranks."""
        return Selector(self.task_embedding, self.gate.weight, self.gate.bias)

    def probabilities(self) -> Float[Tensor, "tasks ranks"]:
        """p: of every rank, for every task."""
        with without_autocast(self.A):  # a rounded gate picks other ranks
            return F.linear(*self.selector).softmax(dim=-1)

    def choice(self) -> Int[Tensor, "tasks"]:
        """Which of the ranks every task uses, counted from 0."""
        return self.probabilities().argmax(dim=-1)

    def ranks(self) -> Int[Tensor, "tasks"]:
        """Rank of every task."""
        return (self.choice() + 1).clamp(max=self.config.rank)

    def term_weights(self) -> Float[Tensor, "tasks r"]:
        """The weight of each rank-one term for each task."""
        return term_weights(self.probabilities(), self.ladder, self.unit)

    def select(self, tasks: Int[Tensor, "rows"]) -> tuple[Float[Tensor, "rows r"], Float[Tensor, "tasks i"]]:
        """alpha / r times the terms' weights, for rows of `tasks`; and a copy of the task table."""
        return select_terms([self], tasks)[0]

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus each row's first m_t rank-one terms."""
        tasks = ctx.tasks(x.shape[0])
        w, table = ctx.prepared or self.select(tasks)
        if self.training and self.gives_term:
            summary = summarise(x, ctx, self.config.anchor)
            record_contrastive(ctx, summary, table, tasks)
        y = base(x)
        w = ctx.spread(w, x.shape[0], "rows of weights")
        # Its experts are the ranks: a task has chosen one of them.
        ctx.stat("gates", lambda: F.one_hot(self.choice(), self.config.choices)[tasks].to(w.dtype))
        return add_terms(y, self.dropout(x), self.A, self.B, w)

    def delta_weight(self, task: int | None) -> Float[Tensor, "o i"]:
        """(alpha / r) B diag(weights of the task) A."""
        A, B = self.lora_factors(task)
        return self.scale * B @ A

    def lora_factors(self, task: int | None) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        """A and B diag(weights of the task)."""
        assert task is not None
        return self.A, self.B * self.term_weights()[task]


class FrozenMoREAdapter(FrozenChoice, MoREAdapter):
    """The selector of the release."""

    def select(self, tasks: Int[Tensor, "rows"]) -> tuple[Float[Tensor, "rows r"], Float[Tensor, "tasks i"]]:
        """alpha / r times the weights of the frozen ranks' terms."""
        return self.scale * self.term_weights().index_select(0, tasks), self.task_embedding.clone()


def select_terms(sites: Sequence[MoREAdapter], tasks: Int[Tensor, "rows"]) -> Sequence[tuple[Tensor, Tensor]]:
    """alpha / r times the terms' weights of these sites, for rows of `tasks`; and a copy of each task table."""
    first, selectors = sites[0], [site.selector for site in sites]

    def weigh(logits: Tensor) -> Tensor:
        return term_weights(logits.softmax(dim=-1), first.ladder, first.scale * first.unit)

    kind = computing_type(first.A)
    with without_autocast(first.A):  # a rounded gate picks other ranks
        return route_rows(selectors, weigh, tasks, kind)
