"""DCFT without building W: of an input in rows of s, A contracts the rows and C what lies within them.

Multiply-adds per token: r (in + out) + r s^2, where the definition takes in out.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


def update(
    x: Float[Tensor, "*n i"], A: Float[Tensor, "r a"], B: Float[Tensor, "b r"], C: Float[Tensor, "s s"], out: int
) -> Float[Tensor, "*n o"]:
    """`moepeft.methods.dcft.update`."""
    s = C.shape[0]
    tiles = x[..., : A.shape[1] * s].reshape(*x.shape[:-1], A.shape[1], s)
    inner = torch.einsum("...rq,pq->...rp", torch.einsum("...aq,ra->...rq", tiles, A), C)
    expanded = torch.einsum("...rp,br->...bp", inner, B).flatten(-2)
    return nn.functional.pad(expanded, (0, out - expanded.shape[-1]))
