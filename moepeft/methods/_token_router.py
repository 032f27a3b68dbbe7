"""What methods share whose experts are low-rank pairs of one linear layer, weighed token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moepeft.ops.draws import uniform
from moepeft.ops.linear import dropout_of
from moepeft.ops.precision import without_autocast
from moepeft.protocols import LinearSite


def probabilities(x: Float[Tensor, "*n i"], router: Float[Tensor, "experts i"]) -> Float[Tensor, "*n experts"]:
    """softmax(W x) per token, in the router's precision: half precision would make ties of near experts."""
    with without_autocast(x):
        return F.linear(x.to(router.dtype), router).softmax(dim=-1)


def mixture(
    x: Float[Tensor, "*n i"],
    A: Float[Tensor, "experts r i"],
    B: Float[Tensor, "experts o r"],
    weights: Float[Tensor, "*n experts"],
) -> Float[Tensor, "*n o"]:
    """sum_e weights_e B_e A_e x, token by token. A weight of zero leaves its expert out."""
    down = torch.einsum("...i,eri->...er", x, A)
    return torch.einsum("...er,eor->...o", weights.unsqueeze(-1) * down, B)


class RoutedPairs(nn.Module):
    """The experts' factors A (E, r, in) and B (E, out, r) of one site, and its router W (E, in)."""

    def __init__(self, site: LinearSite, experts: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        bound = site.in_features**-0.5
        self.A = nn.Parameter(uniform((experts, rank, site.in_features), bound))
        self.B = nn.Parameter(uniform((experts, site.out_features, rank), 0.0))
        self.router = nn.Parameter(uniform((experts, site.in_features), bound))
        self.dropout = dropout_of(dropout)

    def probabilities(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n experts"]:
        """softmax(W x) per token."""
        return probabilities(x, self.router)

    def add_mixture(
        self, y: Float[Tensor, "*n o"], x: Float[Tensor, "*n i"], weights: Float[Tensor, "*n experts"]
    ) -> Float[Tensor, "*n o"]:
        """y plus the scaled mixture of the experts' updates of x."""
        mixed = mixture(self.dropout(x), self.A.to(x.dtype), self.B.to(x.dtype), weights.to(x.dtype))
        return y + self.scale * mixed.to(y.dtype)
