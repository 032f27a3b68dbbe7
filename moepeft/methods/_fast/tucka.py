"""Fast path of TuckA: T = U M U^T is never built; x U, then M, then U^T, each as wide as the rank.

M is linear in the gates of a site's experts. Their matrices depend on parameters alone, and are made for all sites
together. The norms are divided out there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepeft.errors import ConfigError
from moepeft.ops.linear import add_linear, computing_type, multiply_rows
from moepeft.ops.precision import without_autocast
from moepeft.ops.together import Together, alike

Factors = tuple[Tensor, Tensor, Tensor, Any]
"""`moepeft.methods.tucka.Factors`: core, factor, mixing, ready."""
Ready = tuple[Tensor, Tensor]
"""Of a site: U, and the matrices (k t, r r) of its experts, alpha times as large and with all norms divided out."""


def correct_input(x: Tensor, factors: Factors, routing: Any, alpha: float) -> Tensor:
    """Fast path of `moepeft.methods.tucka.correct_input`."""
    ready: Ready = factors[3] or make_ready([factors], alpha)[0]
    kind = computing_type(x)
    U, experts = ready[0].to(kind), ready[1]
    M = torch.unflatten((routing.gates.to(experts.dtype) @ experts).to(kind), -1, (U.shape[1], -1))
    if M.shape[0] not in (1, x.shape[0]):  # beam search repeated the rows after they were routed
        M = M.repeat_interleave(x.shape[0] // M.shape[0], dim=0)
    down = F.linear(x, U.T)
    if M.shape[0] == 1:
        return add_linear(x, down, U @ M.squeeze(0).T)
    return add_linear(x, multiply_rows(down, M), U)


def make_ready(factors: Sequence[Factors], alpha: float) -> list[Ready]:
    """What is ready of every site, from its parameters."""
    kind = computing_type(factors[0][0])
    together, groups = Together(len(factors)), alike([each[1].shape[0] for each in factors])
    order = [number for group in groups for number in group]
    ready: dict[int, Tensor] = {}
    squares = []
    with without_autocast(factors[0][0]):
        for group in groups:
            U = together.stack([factors[number][1] for number in group], group)
            squares.append(U.square().sum(dim=(1, 2)))
            ready.update(zip(group, together.apart(U.to(kind), group), strict=True))
        core = together.stack([factors[number][0] for number in order], order)
        mixing = together.stack([factors[number][2] for number in order], order)
        square = core.square().sum(dim=(2, 3, 4)) * mixing.square().sum(dim=(1, 2)).unsqueeze(1)
        scale = alpha * square.rsqrt() / torch.cat(squares).unsqueeze(1)
        experts = (mixing.unsqueeze(1) @ core.flatten(3)) * scale[:, :, None, None]
        of_sites = together.apart(experts.flatten(1, 2).to(kind), order)
    matrices = dict(zip(order, of_sites, strict=True))
    return [(ready[number], matrices[number]) for number in range(len(factors))]


def fixed_update(factors: Factors, gates: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """alpha W0 T^T for the T of these gates, (experts,): the update of W0 where every input is routed alike."""
    U, experts = make_ready([factors], alpha)[0]
    if gates.shape != experts.shape[:1]:
        raise ConfigError(f"TuckA: gates of shape {tuple(gates.shape)}, wanted ({len(experts)},): groups times experts")
    M = torch.unflatten(gates.to(experts) @ experts, -1, (U.shape[1], -1))
    return (weight.to(U) @ U @ M.T) @ U.T
