"""How EPT's update is computed; `moepeft.methods.ept` says what it is. Pure functions of its parts.

weights   of each expert, by rising scale: gate, scale and dimension factor multiplied, (rows, E) or (rows, *n, E)
A, B      the widest seed, (r, in // s_min) and (out // s_min, r); the pruner gives scale s A[:, :in // s], B[:out // s]
kernels   per scale s, those of its experts, (experts, s, s), or (experts, out // s, s) of the release's operator

The Kronecker operator is three products. Let g divide all scales and m = s / g. Among the features of one residue mod
g, A (x) I_s acts as A (x) I_m; of all scales these stand below each other in `down`, and the B (x) I_m in `up`: r M
rows, M the sum of the m. Between the two, a row's gated kernels are one block diagonal matrix of S = g M columns, a
block per scale. To have residues apart halves the operations (g = 2), for a copy of what comes in and one of what goes
out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_kronecker_update(
    y: Float[Tensor, "rows *n out"],
    apart: Float[Tensor, "rows *n g i_g"],
    weights: Tensor,
    A: Float[Tensor, "r i_s"],
    B: Float[Tensor, "o_s r"],
    kernels: Sequence[Tensor],
) -> Float[Tensor, "rows *n out"]:
    """The equations' operator: y plus the sum over experts of weight times (Z_e (x) K_e) x, Z_e = B A pruned.

    Args:
        y: what the update is added to; stays where no scale reaches.
        apart: ``residues(x, g)``, g a common divisor of the scales.
        weights: of the experts.
        A: the widest seed.
        B: the widest seed.
        kernels: per scale.
    """
    device = apart.device.type
    if torch.is_autocast_enabled(device):
        apart = apart.to(torch.get_autocast_dtype(device))
    updated: Tensor = _KroneckerUpdate.apply(y, apart, weights, A, B, *kernels)  # type: ignore[no-untyped-call]
    return updated


class _KroneckerUpdate(torch.autograd.Function):
    """Both directions by hand: a third of autograd's kernels, most of them tiny, and half of what it keeps."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, apart: Tensor, weights: Tensor, A: Tensor, B: Tensor, *kernels: Tensor) -> Tensor:
        with torch.autocast(device_type=apart.device.type, enabled=False):
            g = apart.shape[-2]
            scales = [kernel.shape[-1] // g for kernel in kernels]
            down = spread(A, scales, apart.shape[-1]).to(apart.dtype)
            up = spread(B.T, scales, y.shape[-1] // g).to(apart.dtype)
            bank = block_diagonal(kernels)
            low = together((apart.flatten(0, -2) @ down.T).view(-1, g, len(down)))
            mixed = _mixed(low, _mixing(weights, bank).to(low.dtype), g)
            update = (mixed @ up).view(*apart.shape[:-1], -1)
            ctx.save_for_backward(apart, weights, down, up, bank, low)
            ctx.scales, ctx.seeds, ctx.kernels = scales, (A.shape, B.T.shape), [kernel.shape for kernel in kernels]
            return add_together(y, update.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        apart, weights, down, up, bank, low = ctx.saved_tensors
        with torch.autocast(device_type=grad.device.type, enabled=False):
            g, width = apart.shape[-2], bank.shape[-1]
            mixing = _mixing(weights, bank).to(low.dtype)
            # Cheaper made again than kept.
            mixed = _mixed(low, mixing, g)
            of_update = residues(grad.to(low.dtype), g).flatten(0, -2)
            of_up = mixed.T @ of_update
            of_mixed = together((of_update @ up.T).view(-1, g, len(up))).view(len(mixing), -1, width)
            of_mixing = (of_mixed.mT @ low.view_as(of_mixed)).flatten(1).to(weights.dtype)
            of_low = residues((of_mixed @ mixing).view_as(low), g).flatten(0, 1)
            of_down = of_low.T @ apart.flatten(0, -2)
            of_apart = (of_low @ down).view_as(apart) if ctx.needs_input_grad[1] else None
            of_weights = (of_mixing @ bank.flatten(1).T).view_as(weights)
            of_bank = (weights.flatten(0, -2).T @ of_mixing).view_as(bank)
            of_A, of_B = (
                collect(factor, ctx.scales, shape).to(weights.dtype)
                for factor, shape in zip((of_down, of_up), ctx.seeds, strict=True)
            )
        return grad, of_apart, of_weights, of_A, of_B.T, *_blocks(of_bank, ctx.kernels)


def _mixing(weights: Float[Tensor, "*n experts"], bank: Float[Tensor, "experts S S"]) -> Float[Tensor, "n S S"]:
    """Every row's, or token's, gated sum of kernels."""
    return (weights.flatten(0, -2) @ bank.flatten(1)).view(-1, *bank.shape[1:])


def _mixed(low: Float[Tensor, "tokens k"], mixing: Float[Tensor, "n S S"], g: int) -> Float[Tensor, "tokens_g k_g"]:
    """I_r (x) K of each row, or token, applied to its part of `low`; residues apart."""
    # One kernel for all tokens of a row: one product per row, not one per token.
    pieces = low.view(len(mixing), -1, mixing.shape[-1]) @ mixing.mT
    return residues(pieces.view_as(low), g).flatten(0, 1)


def spread(seed: Float[Tensor, "r w"], scales: Sequence[int], width: int) -> Float[Tensor, "k width"]:
    """Of each m in `scales` seed[:, :width // m] (x) I_m, rank by rank below each other: k is r times their sum."""
    placed = seed.new_zeros(len(seed), sum(scales), width)
    for part in _diagonals(placed, scales):
        part.copy_(seed[:, : part.shape[1], None])
    return placed.flatten(0, 1)


def collect(factor: Float[Tensor, "k width"], scales: Sequence[int], shape: torch.Size) -> Float[Tensor, "r w"]:
    """The adjoint of `spread`: what a gradient of its result is for a seed of this shape."""
    seed = factor.new_zeros(shape)
    for part in _diagonals(factor.view(shape[0], -1, factor.shape[1]), scales):
        seed[:, : part.shape[1]] += part.sum(dim=-1)
    return seed


def _diagonals(placed: Float[Tensor, "r M width"], scales: Sequence[int]) -> Iterator[Float[Tensor, "r w m"]]:
    """Where the seed of each scale stands in what `spread` makes: m times."""
    for m, end in zip(scales, itertools.accumulate(scales), strict=True):
        whole = placed.shape[-1] // m * m
        yield placed[:, end - m : end, :whole].view(len(placed), m, -1, m).diagonal(dim1=1, dim2=3)


def block_diagonal(kernels: Sequence[Tensor]) -> Float[Tensor, "experts S S"]:
    """Each expert's kernel at its scale's place on the diagonal; S is the sum of scales."""
    width = sum(kernel.shape[-1] for kernel in kernels)
    bank = kernels[0].new_zeros(sum(map(len, kernels)), width, width)
    for block, kernel in zip(_blocks(bank, [kernel.shape for kernel in kernels]), kernels, strict=True):
        block.copy_(kernel)
    return bank


def _blocks(bank: Float[Tensor, "experts S S"], shapes: Sequence[torch.Size]) -> Iterator[Float[Tensor, "_ s s"]]:
    """Where the kernels of each scale stand in what `block_diagonal` makes."""
    counts, sizes = ([shape[0] for shape in shapes], [shape[1] for shape in shapes])
    ends = zip(counts, itertools.accumulate(counts), sizes, itertools.accumulate(sizes), strict=True)
    for count, last, size, end in ends:
        yield bank[last - count : last, end - size : end, end - size : end]


def residues(x: Float[Tensor, "*n d"], g: int) -> Float[Tensor, "*n g d_g"]:
    """The features of each residue mod `g` beside each other; what is left of `d` over a multiple of `g` is dropped."""
    whole = x.shape[-1] // g * g
    return x[..., :whole].reshape(*x.shape[:-1], -1, g).mT.contiguous()


def together(x: Float[Tensor, "*n g d_g"]) -> Float[Tensor, "*n d"]:
    """The inverse of `residues`."""
    return x.mT.flatten(-2)


def add_together(y: Float[Tensor, "*n d"], apart: Float[Tensor, "*n g d_g"]) -> Float[Tensor, "*n d"]:
    """y plus ``together(apart)``, where that is narrower plus zero."""
    # Residue by residue: an addition with the two last dimensions swapped is slower, a copy to swap them is one more.
    total, g = y.clone(memory_format=torch.contiguous_format), apart.shape[-2]
    for k in range(g):
        total[..., k : apart.shape[-1] * g : g] += apart[..., k, :]
    return total


def add_channel_update(
    y: Float[Tensor, "rows *n out"],
    x: Float[Tensor, "rows *n i"],
    weights: Tensor,
    A: Float[Tensor, "r i_s"],
    B: Float[Tensor, "o_s r"],
    kernels: Sequence[Tensor],
) -> Float[Tensor, "rows *n out"]:
    """The release's operator: a seed maps the first in // s features to out // s channels, stretched by the kernel."""
    if weights.dim() < x.dim():
        weights = weights.reshape(weights.shape[0], *(1,) * (x.dim() - 2), weights.shape[-1])
    for weight, kernel in zip(torch.split(weights, [len(kernel) for kernel in kernels], dim=-1), kernels, strict=True):
        _, channels, s = kernel.shape
        narrow = x[..., : x.shape[-1] // s]
        seeds = A[:, : narrow.shape[-1]].to(x.dtype), B[:channels].to(x.dtype)
        stretched = torch.einsum("...e,ehs->...hs", weight, kernel).to(x.dtype)
        update = (F.linear(F.linear(narrow, seeds[0]), seeds[1]).unsqueeze(-1) * stretched).flatten(-2)
        y = y + F.pad(update, (0, y.shape[-1] - update.shape[-1])).to(y.dtype)
    return y
