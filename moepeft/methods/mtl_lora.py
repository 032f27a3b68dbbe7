"""MTL-LoRA: a shared down-projection, a small square matrix for each task, up-projections mixed by task.

Paper: Yang et al., MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning, arXiv 2410.09437, equations 3 and 4.
Release: pUmpKin-Co/MTL-LoRA, commit 7848a705 (MIT); a later one is adapter-hub/adapters, pull request 792.

    v_t = softmax(w_t / tau)                                     w_t (N): one number per up-projection
    y = W0 x + (alpha / r) (sum_n v_t[n] B_n) Lambda_t A x       A (r, in), Lambda_t (r, r), B_n (out, r)

A is shared by all tasks. Lambda_t starts at the identity and B_n at zero.

Differences between paper and release: none that changes a number. The release also has diagonal Lambda_t, which its
scripts do not use; not reproduced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moepeft.config import MethodConfig, Purpose, Recipe
from moepeft.context import SiteContext
from moepeft.fast import has_fast_path
from moepeft.methods._fast import per_position as _fast
from moepeft.methods._validation import check_count, check_dropout, check_positive
from moepeft.ops.draws import uniform
from moepeft.ops.linear import dropout_of
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class MTLLoRA(MethodConfig):
    """Configuration of MTL-LoRA.

    Attributes:
        rank: rank r.
        alpha: numerator of the scale alpha / r.
        num_experts: number of up-projections N.
        num_tasks: number of tasks T.
        temperature: tau, which divides the weights of the up-projections before their softmax.
        dropout: probability of dropping an input feature of the adapter while training.
    """

    name: ClassVar[str] = "mtl-lora"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "released": {},
        "released_commonsense": {"rank": 8, "alpha": 16.0, "num_experts": 3, "temperature": 0.1, "dropout": 0.05},
    }
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "commonsense": Recipe(
            preset="released_commonsense",
            sites=("q_proj", "k_proj", "v_proj", "o_proj"),
            learning_rate=3e-4,
            batch_size=8,
            epochs=3,
            max_length=256,
            sources={
                **dict.fromkeys(
                    (
                        *("num_experts", "temperature", "sites"),
                        *("learning_rate", "batch_size", "epochs", "max_length"),
                    ),
                    "script/llama2_7B_mlora_qkvo.sh",
                ),
                **dict.fromkeys(("rank", "alpha"), "script/llama2_7B_mlora_qkvo_eval.sh"),
                "dropout": "mlora_finetune.py",
            },
        )
    }
    sizes: ClassVar[tuple[str, ...]] = ("rank", "num_experts")
    purposes: ClassVar[Mapping[str, Purpose]] = {"transforms": "task_table", "weights": "router"}

    rank: int = 8
    alpha: float = 32.0
    num_experts: int = 3
    num_tasks: int = 1
    temperature: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for field in ("rank", "num_experts", "num_tasks"):
            check_count("MTL-LoRA", field, getattr(self, field))
        check_positive("MTL-LoRA", "alpha", self.alpha)
        check_positive("MTL-LoRA", "temperature", self.temperature)
        check_dropout("MTL-LoRA", self.dropout)

    @property
    def capabilities(self) -> Capabilities:
        """Routes by task, so it merges per task."""
        return Capabilities(routing="task")

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """One A, a matrix and weights for each task, N B's."""
        return MTLLoRAAdapter(site, self)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """r (in + N out) + T (r^2 + N) per site."""
        r, N = self.rank, self.num_experts
        tasks = self.num_tasks * (r * r + N)
        return sum(r * (site.in_features + N * site.out_features) + tasks for site in sites)


@has_fast_path(_fast.mtl_lora)
def update(
    x: Float[Tensor, "rows *n i"],
    A: Float[Tensor, "r i"],
    transforms: Float[Tensor, "rows r r"],
    B: Float[Tensor, "heads o r"],
    v: Float[Tensor, "rows heads"],
) -> Float[Tensor, "rows *n o"]:
    """(sum_n v[n] B_n) Lambda A x, with each row's own v and Lambda."""
    up = torch.einsum("bn,nor->bor", v, B)
    down = torch.einsum("b...i,ri->b...r", x, A)
    return torch.einsum("b...r,bor->b...o", torch.einsum("b...r,bqr->b...q", down, transforms), up)


class MTLLoRAAdapter(nn.Module):
    """A (r, in), the tasks' transforms Lambda (T, r, r), B (N, out, r) and the tasks' weights w (T, N)."""

    def __init__(self, site: LinearSite, config: MTLLoRA) -> None:
        super().__init__()
        self.scale = config.alpha / config.rank
        self.temperature = config.temperature
        r, N, T = config.rank, config.num_experts, config.num_tasks
        self.A = nn.Parameter(uniform((r, site.in_features), site.in_features**-0.5))
        self.transforms = nn.Parameter(torch.eye(r).repeat(T, 1, 1))
        self.B = nn.Parameter(uniform((N, site.out_features, r), 0.0))
        self.weights = nn.Parameter(uniform((T, N), N**-0.5))
        self.dropout = dropout_of(config.dropout)

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus the update of each row's task."""
        y = base(x)
        tasks = ctx.tasks(x.shape[0])
        v = self.mixture()[tasks]
        ctx.stat("gates", v)
        transforms = self.transforms[tasks]
        A, transforms, B, v = (tensor.to(x.dtype) for tensor in (self.A, transforms, self.B, v))
        return y + self.scale * update(self.dropout(x), A, transforms, B, v).to(y.dtype)

    def mixture(self) -> Float[Tensor, "tasks heads"]:
        """softmax(w_t / tau) of every task."""
        return (self.weights / self.temperature).softmax(dim=-1)

    def delta_weight(self, task: int | None) -> Float[Tensor, "o i"]:
        """(alpha / r) (sum_n v_t[n] B_n) Lambda_t A."""
        A, B = self.lora_factors(task)
        return self.scale * (B @ A)

    def lora_factors(self, task: int | None) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        """Lambda_t A and sum_n v_t[n] B_n."""
        assert task is not None
        return self.transforms[task] @ self.A, torch.einsum("n,nor->or", self.mixture()[task], self.B)
