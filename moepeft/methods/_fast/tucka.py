"""Fast path of TuckA: T = U M U^T is never built; x U, then M, then U^T, each as wide as the rank.

M is linear in the gates of a site's experts. Their matrices depend on parameters alone, and are made for all sites
together. The norms are divided out there.

U is kept transposed, (r, i). So the rank is the number of rows of every narrow factor and of its gradient. With a rank
below 16, the libraries of a CPU take several times as long for a product of as few columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepeft.errors import ConfigError
from moepeft.ops.linear import add_product, computing_type, multiply_rows
from moepeft.ops.precision import without_autocast
from moepeft.ops.together import Together, alike

Factors = tuple[Tensor, Tensor, Tensor, Any]
"""`moepeft.methods.tucka.Factors`: core, factor, mixing, ready."""
Ready = tuple[Tensor, Tensor]
"""Of a site: U^T, and the matrices (k t, r r) of its experts, times alpha, with all norms divided out."""


def correct_input(x: Tensor, factors: Factors, routing: Any, alpha: float) -> Tensor:
    """Fast path of `moepeft.methods.tucka.correct_input`."""
    ready: Ready = factors[3] or make_ready([factors], alpha)[0]
    kind = computing_type(x)
    U_T, experts = ready[0].to(kind), ready[1]
    number, r = len(routing.gates), len(U_T)
    M = (routing.gates.to(experts.dtype) @ experts).to(kind)
    down = F.linear(x, U_T)
    if number == 1:
        return add_product(x, down, M.view(r, r) @ U_T)
    M = M.view(number, r, r)
    if number != x.shape[0]:  # beam search repeated the rows after they were routed
        M = M.repeat_interleave(x.shape[0] // number, dim=0)
    return add_product(x, multiply_rows(down, M), U_T)


def make_ready(factors: Sequence[Factors], alpha: float) -> list[Ready]:
    """What is ready of every site, from its parameters."""
    kind = computing_type(factors[0][0])
    together, groups = Together(len(factors)), alike([each[1].shape[0] for each in factors])
    order = [number for group in groups for number in group]
    with without_autocast(factors[0][0]):
        core, mixing, *Us = together.stack(
            {number: factors[number][0] for number in order},
            {number: factors[number][2] for number in order},
            *({number: factors[number][1] for number in group} for group in groups),
        )
        squares = torch.cat([U.square().sum(dim=(1, 2)) for U in Us])
        square = core.square().sum(dim=(2, 3, 4)) * mixing.square().sum(dim=(1, 2)).unsqueeze(1)
        scale = alpha * square.rsqrt() / squares.unsqueeze(1)
        experts = (mixing.unsqueeze(1) @ core.flatten(3)) * scale[:, :, None, None]
        of_groups = ((group, U.mT.contiguous().to(kind)) for group, U in zip(groups, Us, strict=True))
        matrices, *parts = together.apart((order, experts.flatten(1, 2).to(kind)), *of_groups)
    factor = {number: U_T for own in parts for number, U_T in own.items()}
    return [(factor[number], matrices[number]) for number in range(len(factors))]


def fixed_update(factors: Factors, gates: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """alpha W0 T^T for the T of these gates, (experts,): the update of W0 where every input is routed alike."""
    U_T, experts = make_ready([factors], alpha)[0]
    if gates.shape != experts.shape[:1]:
        raise ConfigError(f"TuckA: gates of shape {tuple(gates.shape)}, wanted ({len(experts)},): groups times experts")
    M = (gates.to(experts) @ experts).view(len(U_T), -1)
    return (weight.to(U_T) @ U_T.T @ M.T) @ U_T
