"""Teachers: a small network with a known update per task. Students see inputs and the teacher's answers.

All tasks draw their inputs from one distribution, so that the task's id alone tells the tasks apart. A teacher's
conflict c says how much of an update is the task's own:

    U_t = strength (sqrt(1 - c) S + sqrt(c) I_t)        S shared by all tasks, I_t independent; both of norm 1

With c = 0 all tasks have one update. With c = 1 no task knows anything of another's. What S and I_t look like is the
teacher's structure; every structure is one that some method was made for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.protocols.seeds import stream

Structure = Literal["low_rank", "kronecker", "pyramid", "nested", "pool", "input"]
STRUCTURES: tuple[Structure, ...] = get_args(Structure)

# What the structures that mix sizes mix, task by task: EPT's scales, MoRE's ranks.
PYRAMID_SCALES = (2, 2, 4, 4, 6, 6, 8, 8)
LARGEST_RANK = 8
POOL_TERMS, TERMS_OF_A_TASK = 16, 4


class FeedForward(nn.Module):
    """The host: a network of two linear layers, as in a transformer's block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, positions, width) -> the same shape."""
        answer: Tensor = self.down_proj(F.gelu(self.up_proj(x)))
        return answer


@dataclass(frozen=True)
class Teacher:
    """A host and the update that every task makes to its two layers.

    Attributes:
        host: with frozen weights.
        up: updates of the first layer, (tasks, inner, width).
        down: updates of the second layer, (tasks, width, inner).
    """

    host: FeedForward
    up: Tensor
    down: Tensor

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self.up)

    @torch.no_grad()
    def answer(self, x: Tensor, tasks: Tensor) -> Tensor:
        """What the teacher of each row's task makes of the row.

        Args:
            x: (rows, positions, width).
            tasks: (rows,).
        """
        inner = self.host.up_proj(x) + torch.einsum("bsi,boi->bso", x, self.up[tasks])
        inner = F.gelu(inner)
        outer: Tensor = self.host.down_proj(inner) + torch.einsum("bsi,boi->bso", inner, self.down[tasks])
        return outer


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """What decides a teacher but for the seed of its draws.

    Attributes:
        structure: of the updates.
        tasks: number T of tasks.
        conflict: c, from 0 (one update for all) to 1 (independent ones).
        rank: of a low-rank update, and of what a Kronecker product multiplies.
        scale: of the kernels where all have one scale.
        width: features of the network's input and output.
        inner: features between its layers.
        strength: Frobenius norm of every update at c = 0 and c = 1.
    """

    structure: Structure = "low_rank"
    tasks: int = 8
    conflict: float = 1.0
    rank: int = 2
    scale: int = 4
    width: int = 48
    inner: int = 96
    strength: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.conflict <= 1:
            raise ValueError(f"conflict={self.conflict}, wanted a number from 0 to 1")
        if self.structure not in STRUCTURES:
            raise ValueError(f"structure={self.structure!r}, wanted one of {', '.join(STRUCTURES)}")


def true_sizes(plan: Curriculum) -> tuple[int, ...] | None:
    """The scale or rank of every task's own update, where the structure mixes several; else None."""
    if plan.structure == "pyramid":
        return tuple(PYRAMID_SCALES[task % len(PYRAMID_SCALES)] for task in range(plan.tasks))
    if plan.structure == "nested":
        return tuple(task % LARGEST_RANK + 1 for task in range(plan.tasks))
    return None


def make_teacher(plan: Curriculum, seed: int = 0) -> Teacher:
    """Draw a teacher; equal arguments give equal teachers."""
    draw = torch.Generator().manual_seed(stream("teacher", seed))
    host = FeedForward(plan.width, plan.inner).requires_grad_(False)
    for parameter in host.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) / parameter.shape[-1] ** 0.5)
    updates = []
    for layer in (host.up_proj, host.down_proj):
        shared, own = _DRAW[plan.structure](layer.weight, plan.tasks, plan.rank, plan.scale, draw)
        mixed = (1 - plan.conflict) ** 0.5 * _unit(shared) + plan.conflict**0.5 * _unit(own)
        updates.append(plan.strength * mixed)
    return Teacher(host, *updates)


def _unit(update: Tensor) -> Tensor:
    """Each update over its Frobenius norm."""
    norm: Tensor = torch.linalg.matrix_norm(update, keepdim=True)
    return update / norm


# Every function below gives the shared update (o, i) and the tasks' own updates (tasks, o, i) of one layer.


def _low_rank(weight: Tensor, tasks: int, rank: int, _: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Products of rank r that have nothing in common: plain LoRA is made for the shared one."""
    o, i = weight.shape
    drawn = torch.randn(tasks + 1, o, rank, generator=draw) @ torch.randn(tasks + 1, rank, i, generator=draw)
    return drawn[0], drawn[1:]


def _kronecker(weight: Tensor, tasks: int, rank: int, scale: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """One seed Z of rank r for all tasks, a kernel of one scale per task: Z (x) K_t."""
    grown = _grow(weight, rank, [scale] * (tasks + 1), draw)
    return grown[0], torch.stack(grown[1:])


def _pyramid(weight: Tensor, tasks: int, rank: int, _: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same with a scale for every task: the pyramid that EPT is made for."""
    own = [PYRAMID_SCALES[task % len(PYRAMID_SCALES)] for task in range(tasks)]
    grown = _grow(weight, rank, [min(PYRAMID_SCALES), *own], draw)
    return grown[0], torch.stack(grown[1:])


def _grow(weight: Tensor, rank: int, scales: Sequence[int], draw: torch.Generator) -> list[Tensor]:
    o, i = weight.shape
    smallest = min(scales)
    A, B = torch.randn(rank, i // smallest, generator=draw), torch.randn(o // smallest, rank, generator=draw)
    grown = []
    for scale in scales:
        product = torch.kron(B[: o // scale] @ A[:, : i // scale], torch.randn(scale, scale, generator=draw))
        grown.append(F.pad(product, (0, i - product.shape[1], 0, o - product.shape[0])))
    return grown


def _nested(weight: Tensor, tasks: int, _: int, __: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The first m_t rank-one terms of one product, m_t from 1 to 8: MoRE is made for it."""
    terms = _terms(weight, LARGEST_RANK, draw)
    prefixes = [terms[: task % LARGEST_RANK + 1].sum(dim=0) for task in range(tasks)]
    return terms.sum(dim=0), torch.stack(prefixes)


def _pool(weight: Tensor, tasks: int, _: int, __: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each task a few terms of one pool, weighed at random: mixtures of shared experts are made for it."""
    terms = _terms(weight, POOL_TERMS, draw)
    chosen = [torch.randperm(POOL_TERMS, generator=draw)[:TERMS_OF_A_TASK] for _ in range(tasks)]
    weights = torch.randn(tasks, TERMS_OF_A_TASK, generator=draw)
    own = [torch.einsum("k,koi->oi", weights[task], terms[which]) for task, which in enumerate(chosen)]
    return terms.sum(dim=0), torch.stack(own)


def _input(weight: Tensor, tasks: int, rank: int, _: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Corrections of the layer's input through one factor: W0 U M_t U^T; TuckA is made for it."""
    U = torch.randn(weight.shape[1], rank, generator=draw)
    M = torch.randn(tasks + 1, rank, rank, generator=draw)
    drawn = weight @ U @ M @ U.T
    return drawn[0], drawn[1:]


def _terms(weight: Tensor, number: int, draw: torch.Generator) -> Tensor:
    o, i = weight.shape
    B, A = torch.randn(number, o, 1, generator=draw), torch.randn(number, 1, i, generator=draw)
    return B @ A


_Draw = Callable[[Tensor, int, int, int, torch.Generator], tuple[Tensor, Tensor]]
_DRAW: dict[Structure, _Draw] = {
    "low_rank": _low_rank,
    "kronecker": _kronecker,
    "pyramid": _pyramid,
    "nested": _nested,
    "pool": _pool,
    "input": _input,
}
