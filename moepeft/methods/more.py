"""MoRE: one LoRA whose rank depends on the task.

Paper: Zhang et al., MoRE: A Mixture of Low-Rank Experts for Adaptive Multi-Task Learning, arXiv 2505.22694.
Release: NLPfreshman0/MoRE, commit b31d8feb (no licence: computed anew, nothing copied).

    p_t = softmax(G e_t + c)          G (r, in), c (r), task table e (T, in); all per site
    m_t = argmax p_t + 1              the rank that task t uses
    y = W0 x + (alpha / r) s_t B[:, :m_t] diag(c_k) A[:m_t] x,    s_t = p_t[m_t] - stop_gradient(p_t[m_t]) + 1

The straight-through factor s_t is 1 and passes the task's gradient to the selector. Rows use different ranks through
a mask on the rank space. A contrastive loss pulls a row's summary towards its task's embedding.

Differences between paper and release (preset `released` reproduces those that change numbers):
* the selector never trains in the release: the map from task to rank is frozen at the first forward, a draw made by
  the initialisation: ``selector="frozen"``. Here the frozen map is saved, so that it survives a reload;
* the paper scales the output by r_t / |T|; the release weighs term k by (k / 8)^2 whatever the rank:
  ``scaling="quadratic"``. In the paper r and |T| are both 8; ``scaling="linear"`` divides by r;
* the release summarises a row by position 0 (the task's name in its prompts): ``anchor="first"``; the mean over real
  tokens is the default here;
* ranks above the eighth are never used in the release; its decoder's contrastive terms are dropped: not reproduced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moepeft.config import MethodConfig
from moepeft.context import SiteContext
from moepeft.methods._contrastive import ContrastiveTerm, contrastive_task_loss, record_contrastive, with_summary
from moepeft.methods._validation import check_choices, check_count, check_dropout, check_positive
from moepeft.ops.draws import normal, uniform
from moepeft.ops.linear import add_linear, per_row
from moepeft.ops.processes import has_processes
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class MoRE(MethodConfig):
    """Configuration of MoRE.

    Attributes:
        rank: largest rank r, and the number of ranks to choose from.
        alpha: numerator of the scale alpha / r.
        num_tasks: number of tasks T.
        selector: train the choice of ranks, or freeze it at the first forward.
        scaling: factor of the update by rank: none, m_t / r on the whole, or (k / 8)^2 on its k-th term.
        contrastive: coefficient of the contrastive loss.
        temperature: its temperature.
        anchor: a row's summary in it: mean over real tokens, or position 0.
        dropout: probability of dropping an input feature of the adapter while training.
    """

    name: ClassVar[str] = "more"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "released": {"selector": "frozen", "scaling": "quadratic", "anchor": "first"},
    }

    rank: int = 8
    alpha: float = 32.0
    num_tasks: int = 1
    selector: Literal["trained", "frozen"] = "trained"
    scaling: Literal["none", "linear", "quadratic"] = "linear"
    contrastive: float = 0.1
    temperature: float = 0.05
    anchor: Literal["mean", "first"] = "mean"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("MoRE", "rank", self.rank)
        check_count("MoRE", "num_tasks", self.num_tasks)
        check_positive("MoRE", "alpha", self.alpha)
        check_positive("MoRE", "contrastive", self.contrastive, zero=True)
        check_positive("MoRE", "temperature", self.temperature)
        check_choices("MoRE", self)
        check_dropout("MoRE", self.dropout)

    @property
    def capabilities(self) -> Capabilities:
        """Routes by task, so it merges per task; a frozen selector gets no gradient."""
        never = ("gate.weight", "gate.bias") if self.selector == "frozen" else ()
        if self.selector == "frozen" and not self.contrastive:
            never = (*never, "task_embedding")
        return Capabilities(
            routing="task", aux_losses=("contrastive",) if self.contrastive else (), never_trained=never
        )

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """The factors, the selector and the task table of one site."""
        return MoREAdapter(site, self)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """r (in + out) + r (in + 1) + T in per site."""
        r, t = self.rank, self.num_tasks
        return sum(
            r * (site.in_features + site.out_features) + r * (site.in_features + 1) + t * site.in_features
            for site in sites
        )

    def aux_loss(self, name: str, terms: Sequence[ContrastiveTerm]) -> Tensor:
        """Coefficient times the mean over sites."""
        return self.contrastive * contrastive_task_loss(terms, self.temperature)


class MoREAdapter(nn.Module):
    """Factors A (r, in), B (out, r), selector gate and task table (T, in) of one site."""

    def __init__(self, site: LinearSite, config: MoRE) -> None:
        super().__init__()
        self.config = config
        self.scale = config.alpha / config.rank
        self.A = nn.Parameter(uniform((config.rank, site.in_features), site.in_features**-0.5))
        self.B = nn.Parameter(uniform((site.out_features, config.rank), 0.0))
        self.task_embedding = nn.Parameter(normal((config.num_tasks, site.in_features), 0.01))
        self.gate = nn.Linear(site.in_features, config.rank)
        nn.init.uniform_(self.gate.weight, -((6 / site.in_features) ** 0.5), (6 / site.in_features) ** 0.5)
        self.dropout = nn.Dropout(config.dropout)
        if config.selector == "frozen":
            self.register_buffer("task_map", torch.full((config.num_tasks,), -1))
        self._map_known = False
        by_rank, self.unit = _weights_by_rank(config)
        self.register_buffer("by_rank", by_rank, persistent=False)

    task_map: Tensor
    by_rank: Tensor

    def ranks(self) -> Int[Tensor, "tasks"]:
        """Rank of every task."""
        choice = self._frozen_map() if self.config.selector == "frozen" else self._probabilities().argmax(dim=-1)
        return choice + 1

    def _probabilities(self) -> Float[Tensor, "tasks r"]:
        """Of every rank, for every task."""
        with torch.autocast(device_type=self.A.device.type, enabled=False):  # a rounded gate picks other ranks
            logits: Tensor = self.gate(self.task_embedding)
            return logits.softmax(dim=-1)

    def _frozen_map(self) -> Int[Tensor, "tasks"]:
        if not self._map_known:
            # Only the first forward (or the first after a load) looks at values: later ones do not synchronise.
            if bool((self.task_map < 0).any()):
                self.task_map.copy_(self.gate(self.task_embedding).argmax(dim=-1))
            self._map_known = True
        return self.task_map

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._map_known = False
        super()._load_from_state_dict(*args, **kwargs)

    def term_weights(self, scale: float = 1.0) -> Float[Tensor, "tasks r"]:
        """`scale` times the weight of each rank-one term for each task: zero above the task's rank."""
        unit = scale * self.unit
        if self.config.selector == "trained":
            chosen: Tensor = _ChosenWeights.apply(self._probabilities(), self.by_rank, unit)  # type: ignore[no-untyped-call]
            return chosen
        weights = self.by_rank.index_select(0, self._frozen_map()).to(self.A.dtype) * unit
        if has_processes():
            # Data parallelism waits for a gradient of every parameter, were it zero: tie in what nothing trains.
            idle = (self.gate.weight, self.gate.bias, self.task_embedding)
            weights = weights + 0 * sum(parameter.sum() for parameter in idle)
        return weights

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus each row's first m_t rank-one terms."""
        tasks = ctx.tasks(x.shape[0])
        if self.training and self.config.contrastive:
            x, summary = with_summary(x, ctx, self.config.anchor)
            record_contrastive(ctx, summary, self.task_embedding, tasks)
        y = base(x)
        weights = self.term_weights(self.scale).index_select(0, tasks)
        # Its experts are the ranks: a task has chosen one of them.
        ctx.stat("gates", lambda: F.one_hot(self.ranks() - 1, self.config.rank)[tasks].to(weights.dtype))
        down = F.linear(self.dropout(x), self.A.to(x.dtype))
        return add_linear(y, down * per_row(weights, down), self.B)

    def delta_weight(self, task: int | None) -> Float[Tensor, "o i"]:
        """(alpha / r) B diag(weights of the task) A."""
        A, B = self.lora_factors(task)
        return self.scale * B @ A

    def lora_factors(self, task: int | None) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        """A and B diag(weights of the task)."""
        assert task is not None
        return self.A, self.B * self.term_weights()[task]


def _weights_by_rank(config: MoRE) -> tuple[Int[Tensor, "r r"], float]:
    """Weight of term k for rank m in row m - 1, column k - 1: whole numbers, exact in every type, and their unit."""
    term = torch.arange(1, config.rank + 1)
    rank = term.unsqueeze(1)
    used = (term <= rank).long()
    if config.scaling == "linear":
        return used * rank, 1 / config.rank
    if config.scaling == "quadratic":
        return used * term.square(), 1 / 64
    return used, 1.0


class _ChosenWeights(torch.autograd.Function):
    """The row of weights of each task's likeliest rank; backward as if multiplied by s_t."""

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, by_rank: Tensor, unit: float) -> Tensor:
        choice = probabilities.argmax(dim=-1)
        weights = by_rank.index_select(0, choice).to(probabilities.dtype) * unit
        ctx.save_for_backward(choice, weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        choice, weights = ctx.saved_tensors
        straight_through = (gradient * weights).sum(dim=-1, keepdim=True)
        return torch.zeros_like(weights).scatter_(-1, choice.unsqueeze(-1), straight_through), None, None
