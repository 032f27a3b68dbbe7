"""How EPT's update is computed; `moepeft.methods.ept` says what it is. Pure functions of its parts.

weights   of each expert, by rising scale: gate, scale and dimension factor multiplied, (rows, E) or (rows, *n, E)
seeds     per scale s, A[:, :in // s] of shape (r, in // s) and B[:out // s] of shape (out // s, r)
kernels   per scale s, those of its experts, (experts, s, s), or (experts, out // s, s) of the release's operator
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Seeds = Sequence[tuple[Tensor, Tensor]]


def kronecker_update(
    apart: Float[Tensor, "rows *n g i_g"], weights: Tensor, seeds: Seeds, kernels: Sequence[Tensor], out_features: int
) -> Float[Tensor, "rows *n out"]:
    """The equations' operator: sum over experts of weight times (Z_e (x) K_e) x.

    Args:
        apart: ``residues(x, g)``, g a common divisor of the scales.
        weights: of the experts.
        seeds: per scale.
        kernels: per scale.
        out_features: width of the result; zeros where no scale reaches.
    """
    g = apart.shape[-2]
    down, up = structured_factors(
        seeds, [kernel.shape[-1] // g for kernel in kernels], apart.shape[-1], out_features // g
    )
    low = together(F.linear(apart, down.to(apart.dtype)))
    mixed = residues(mix(low, block_diagonal(kernels, weights).to(apart.dtype)), g)
    return pad_to(out_features, together(F.linear(mixed, up.to(apart.dtype))))


def structured_factors(
    seeds: Seeds, sizes: Sequence[int], inner: int, outer: int
) -> tuple[Float[Tensor, "k inner"], Float[Tensor, "outer k"]]:
    """A (x) I_m and B (x) I_m of all scales, m from `sizes`: k = r times their sum, rank by rank."""
    downs, ups = [], []
    for m, (A, B) in zip(sizes, seeds, strict=True):
        eye = torch.eye(m, dtype=A.dtype, device=A.device)
        downs.append(pad_to(inner, torch.kron(A, eye)).view(A.shape[0], m, inner))
        ups.append(pad_to(outer, torch.kron(B, eye).T).view(A.shape[0], m, outer))
    return torch.cat(downs, dim=1).flatten(0, 1), torch.cat(ups, dim=1).flatten(0, 1).T


def block_diagonal(kernels: Sequence[Tensor], weights: Float[Tensor, "*n experts"]) -> Float[Tensor, "*n S S"]:
    """The weighted sum of kernels: one block per scale, S the sum of scales."""
    sizes = [kernel.shape[-1] for kernel in kernels]
    width, ends = sum(sizes), itertools.accumulate(sizes)
    placed = [F.pad(k, (end - s, width - end) * 2) for k, s, end in zip(kernels, sizes, ends, strict=True)]
    return (weights @ torch.cat(placed).flatten(1)).reshape(*weights.shape[:-1], width, width)


def mix(low: Float[Tensor, "rows *n k"], kernel: Tensor) -> Float[Tensor, "rows *n k"]:
    """Multiply by I_r (x) K; K is one kernel per row, (rows, S, S), or one per token, (rows, *n, S, S)."""
    pieces = low.reshape(*low.shape[:-1], -1, kernel.shape[-1])
    if kernel.dim() == 3:
        # One kernel for all tokens of a row: one product per row, not one per token.
        return (pieces.flatten(1, -2) @ kernel.transpose(1, 2)).reshape(low.shape)
    return (pieces @ kernel.transpose(-1, -2)).flatten(-2)


def residues(x: Float[Tensor, "*n d"], g: int) -> Float[Tensor, "*n g d_g"]:
    """The features of each residue mod `g` beside each other; what is left of `d` over a multiple of `g` is dropped."""
    whole = x.shape[-1] // g * g
    return x[..., :whole].reshape(*x.shape[:-1], -1, g).transpose(-1, -2).contiguous()


def together(x: Float[Tensor, "*n g d_g"]) -> Float[Tensor, "*n d"]:
    """The inverse of `residues`."""
    return x.transpose(-1, -2).flatten(-2)


def channel_update(
    x: Float[Tensor, "rows *n i"], weights: Tensor, seeds: Seeds, kernels: Sequence[Tensor], out_features: int
) -> Float[Tensor, "rows *n out"]:
    """The release's operator: a seed maps the first in // s features to channels, each stretched by its kernel."""
    if weights.dim() < x.dim():
        weights = weights.reshape(weights.shape[0], *(1,) * (x.dim() - 2), weights.shape[-1])
    total = x.new_zeros(())
    of_scale = torch.split(weights, [len(kernel) for kernel in kernels], dim=-1)
    for (A, B), weight, kernel in zip(seeds, of_scale, kernels, strict=True):
        stretched = torch.einsum("...e,ehs->...hs", weight, kernel).to(x.dtype)
        channels = F.linear(F.linear(x[..., : A.shape[1]], A.to(x.dtype)), B.to(x.dtype))
        total = total + pad_to(out_features, (channels.unsqueeze(-1) * stretched).flatten(-2))
    return total


def pad_to(width: int, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n width"]:
    """Zeros behind the last dimension, up to `width`."""
    return F.pad(x, (0, width - x.shape[-1]))
