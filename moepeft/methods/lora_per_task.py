"""LoRA per task: T separate LoRAs, the control in which tasks share nothing.

Paper: none of its own; each task's adapter is that of Hu et al., LoRA, arXiv 2106.09685, equation 3.

    y = W0 x + (alpha / r) B_t A_t x        A_t (r, in), B_t (out, r), t the task of the row

No gradient of one task's rows reaches another task's factors: what a method that shares parameters gains or loses by
sharing shows beside this one. The presets `published` and `released` are the same: there is no release. The factors of
all tasks are stacked, so an optimiser's state (momentum, weight decay) goes on for tasks that have no row in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moepeft.config import MethodConfig, Purpose
from moepeft.context import SiteContext
from moepeft.fast import has_fast_path
from moepeft.methods._fast import per_position as _fast
from moepeft.methods._validation import check_count, check_dropout, check_positive
from moepeft.ops.draws import uniform
from moepeft.ops.linear import dropout_of
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class LoRAPerTask(MethodConfig):
    """Configuration of LoRA per task.

    Attributes:
        rank: rank r of each task's update.
        alpha: numerator of the scale alpha / r.
        num_tasks: number of tasks T.
        dropout: probability of dropping an input feature of the adapter while training.
    """

    name: ClassVar[str] = "lora-per-task"
    purposes: ClassVar[Mapping[str, Purpose]] = {"A": "task_table", "B": "task_table"}

    rank: int = 8
    alpha: float = 32.0
    num_tasks: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("LoRA per task", "rank", self.rank)
        check_count("LoRA per task", "num_tasks", self.num_tasks)
        check_positive("LoRA per task", "alpha", self.alpha)
        check_dropout("LoRA per task", self.dropout)

    @property
    def capabilities(self) -> Capabilities:
        """Routes by task, so it merges per task."""
        return Capabilities(routing="task")

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """One pair of factors for each task."""
        return LoRAPerTaskAdapter(site, self)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """T r (in + out) per site."""
        return sum(self.num_tasks * self.rank * (site.in_features + site.out_features) for site in sites)


@has_fast_path(_fast.lora_per_task)
def update(
    x: Float[Tensor, "rows *n i"],
    A: Float[Tensor, "tasks r i"],
    B: Float[Tensor, "tasks o r"],
    tasks: Int[Tensor, "rows"],
) -> Float[Tensor, "rows *n o"]:
    """B_t A_t x, with the factors of each row's task."""
    return torch.einsum("b...r,bor->b...o", torch.einsum("b...i,bri->b...r", x, A[tasks]), B[tasks])


class LoRAPerTaskAdapter(nn.Module):
    """The factors A (T, r, in) and B (T, out, r) of one site."""

    def __init__(self, site: LinearSite, config: LoRAPerTask) -> None:
        super().__init__()
        self.scale = config.alpha / config.rank
        T, r = config.num_tasks, config.rank
        self.A = nn.Parameter(uniform((T, r, site.in_features), site.in_features**-0.5))
        self.B = nn.Parameter(uniform((T, site.out_features, r), 0.0))
        self.dropout = dropout_of(config.dropout)

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus the scaled update of each row's task."""
        y = base(x)
        tasks = ctx.tasks(x.shape[0])
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        return y + self.scale * update(self.dropout(x), A, B, tasks).to(y.dtype)

    def delta_weight(self, task: int | None) -> Float[Tensor, "o i"]:
        """(alpha / r) B_t A_t."""
        A, B = self.lora_factors(task)
        return self.scale * (B @ A)

    def lora_factors(self, task: int | None) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        """A_t and B_t."""
        assert task is not None
        return self.A[task], self.B[task]
