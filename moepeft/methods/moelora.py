"""MOELoRA: LoRA split into experts that a task's gate weighs.

Paper: Liu et al., When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical Applications,
arXiv 2310.18339, equations 5 to 8.
Release: liuqidong07/MOELoRA-peft, commit 2d9efa4e (MIT).

    w_t = softmax(gate e_t)                       e_t (d_t): embedding of task t; gate (E, d_t), no bias
    y = W0 x + (alpha / r) sum_i w_t[i] B_i A_i x     E experts of rank r / E

Stacked, the experts are one LoRA of rank r whose rank space is multiplied by w_t, each entry r / E times: that is
what is computed, with one row's gate per row of the batch and no loop over experts. Note the scale: the total rank.

Differences between paper and release (preset `released` reproduces those that change numbers):
* one gate and one task table serve all layers in the paper and in the class that the release trains; the release
  also has a class with a gate per layer: ``gate="per_site"``;
* the release broadcasts gates along dimension 1, which is the batch in ChatGLM's sequence-first layout only:
  ``layout="sequence_first"``. On a batch-first model it raises, or silently gates positions when both sizes agree;
* in the release every layer carries an unused gate and table of its own, and row 0 of the table is padding: not
  reproduced, they change no number. Here tasks count from 0, and -1 pads rows of several tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moepeft.config import MethodConfig
from moepeft.context import SiteContext
from moepeft.errors import ConfigError, MissingRouting
from moepeft.methods._validation import check_choices, check_count, check_dropout, check_positive
from moepeft.ops.draws import normal, uniform
from moepeft.ops.linear import add_linear, per_row
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class MOELoRA(MethodConfig):
    """Configuration of MOELoRA.

    Attributes:
        rank: total rank r; each expert has rank r / num_experts.
        alpha: numerator of the scale alpha / r.
        num_experts: number of experts E, a divisor of `rank`.
        num_tasks: number of tasks T.
        task_dim: width d_t of the task embeddings.
        gate: one gate for all sites, or one each.
        layout: which dimension of the input holds the rows.
        dropout: probability of dropping an input feature of the adapter while training.
    """

    name: ClassVar[str] = "moelora"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "released": {"gate": "per_site", "layout": "sequence_first"},
    }
    sizes: ClassVar[tuple[str, ...]] = ("rank", "num_experts")

    rank: int = 16
    alpha: float = 32.0
    num_experts: int = 8
    num_tasks: int = 1
    task_dim: int = 64
    gate: Literal["shared", "per_site"] = "shared"
    layout: Literal["batch_first", "sequence_first"] = "batch_first"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for field in ("rank", "num_experts", "num_tasks", "task_dim"):
            check_count("MOELoRA", field, getattr(self, field))
        check_positive("MOELoRA", "alpha", self.alpha)
        check_choices("MOELoRA", self)
        check_dropout("MOELoRA", self.dropout)
        if self.rank % self.num_experts:
            following = self.num_experts * (self.rank // self.num_experts + 1)
            raise ConfigError(
                f"MOELoRA: rank={self.rank} is not a multiple of num_experts={self.num_experts}, but every expert has "
                f"rank rank / num_experts: the next that fits is {following}"
            )

    @property
    def capabilities(self) -> Capabilities:
        """Routes by task, so it merges per task."""
        return Capabilities(routing="task", batch_first=self.layout == "batch_first")

    def shared(self, sites: Sequence[LinearSite]) -> nn.Module | None:
        """The gate and the task table, if all sites share them."""
        return TaskGate(self) if self.gate == "shared" else None

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """The experts of one site, and its gate if it has its own."""
        assert shared is None or isinstance(shared, TaskGate)
        return MOELoRAAdapter(site, self, shared)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """r (in + out) per site, and d_t (E + T) per gate."""
        gates = 1 if self.gate == "shared" else len(sites)
        factors = sum(self.rank * (site.in_features + site.out_features) for site in sites)
        return factors + gates * self.task_dim * (self.num_experts + self.num_tasks)


class TaskGate(nn.Module):
    """Task table (T, d_t) and gate (E, d_t)."""

    def __init__(self, config: MOELoRA) -> None:
        super().__init__()
        self.task_embedding = nn.Parameter(normal((config.num_tasks, config.task_dim), 1.0))
        self.gate = nn.Parameter(uniform((config.num_experts, config.task_dim), config.task_dim**-0.5))

    def forward(self, tasks: Int[Tensor, "rows ids"]) -> Float[Tensor, "rows experts"]:
        """Weights of the experts; a row of several tasks has the mean of their embeddings, -1 pads."""
        if tasks.shape[1] == 1:
            embedding = self.task_embedding.index_select(0, tasks[:, 0])
        else:
            present = (tasks >= 0).to(self.gate.dtype).unsqueeze(-1)
            embedding = (F.embedding(tasks.clamp(min=0), self.task_embedding) * present).sum(1) / present.sum(1)
        with torch.autocast(device_type=self.gate.device.type, enabled=False):
            return F.softmax(F.linear(embedding, self.gate), dim=-1)


class MOELoRAAdapter(nn.Module):
    """The experts of one site, stacked: A (r, in), B (out, r); expert i owns rows i r/E to (i+1) r/E of the rank."""

    def __init__(self, site: LinearSite, config: MOELoRA, shared: TaskGate | None) -> None:
        super().__init__()
        self.scale = config.alpha / config.rank
        self.expert_rank = config.rank // config.num_experts
        self.rows_dim = 0 if config.layout == "batch_first" else 1
        self.A = nn.Parameter(normal((config.rank, site.in_features), 0.01))
        self.B = nn.Parameter(uniform((site.out_features, config.rank), 0.0))
        self.dropout = nn.Dropout(config.dropout)
        self.own_gate = TaskGate(config) if shared is None else None
        self._gate = (self.own_gate or shared,)  # in a tuple: the shared gate is registered once, elsewhere

    @property
    def gate(self) -> TaskGate:
        """The gate this site is weighed by."""
        gate = self._gate[0]
        assert gate is not None
        return gate

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus the experts' weighted sum."""
        y = base(x)
        weights = self._weights(x, ctx)
        down = F.linear(self.dropout(x), self.A.to(x.dtype))
        if self.rows_dim == 0:
            down = down * per_row(weights, down)
        elif x.dim() == 3:
            down = down * weights.to(down.dtype)
        else:
            raise MissingRouting(f"layout='sequence_first' needs an input of 3 dimensions, got shape {tuple(x.shape)}")
        return add_linear(y, down, self.B)

    def _weights(self, x: Tensor, ctx: SiteContext) -> Float[Tensor, "rows r"]:
        """The gate's weights, once per rank-one term, times the scale."""

        def make() -> tuple[Tensor, Tensor]:
            gates = self.gate(ctx.task_sets(x.shape[self.rows_dim]))
            return gates, (gates * self.scale).repeat_interleave(self.expert_rank, dim=-1)

        gates, weights = make() if self.own_gate is not None else ctx.of_input("moelora.gates", x, make)
        ctx.stat("gates", gates)
        return weights

    def delta_weight(self, task: int | None) -> Float[Tensor, "o i"]:
        """(alpha / r) B diag(w_t) A."""
        A, B = self.lora_factors(task)
        return B @ A * self.scale

    def lora_factors(self, task: int | None) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        """A and B diag(w_t)."""
        gates = self.gate(torch.tensor([[task]], device=self.A.device))
        return self.A, self.B * gates.repeat_interleave(self.expert_rank, dim=-1)
