"""How EPT's update is computed; `moepeft.methods.ept` says what it is. Pure functions of its parts.

weights   of each expert, by rising scale: gate, scale and dimension factor multiplied, (rows, E) or (rows, *n, E)
A, B      the widest seed, (r, in // s_min) and (out // s_min, r); the pruner gives scale s A[:, :in // s], B[:out // s]
kernels   per scale s, those of its experts, (experts, s, s), or (experts, out // s, s) of the release's operator

The Kronecker operator is three products. Let g divide all scales and m = s / g. Among the features of one residue mod
g, A (x) I_s acts as A (x) I_m; of all scales these stand below each other in `down`, and the B (x) I_m in `up`: r M
rows, M the sum of the m. Between the two, a row's gated kernels are one block diagonal matrix of S = g M columns, a
block per scale. To have residues apart halves the operations (g = 2), for a copy of what comes in and one of what goes
out. In rank space tokens come last, (g, M, r, tokens): the S = g M rows that a row's kernels mix, as they multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# A product per group of tokens needs no sorting of what it makes, but groups this small are faster multiplied together.
FEW_TOKENS = 16


def add_kronecker_update(
    y: Float[Tensor, "rows *n out"],
    apart: Apart,
    weights: Float[Tensor, "*some experts"],
    A: Float[Tensor, "r i_s"],
    B: Float[Tensor, "o_s r"],
    kernels: Sequence[Tensor],
    where: Places,
) -> Float[Tensor, "rows *n out"]:
    """The equations' operator: y plus the sum over experts of weight times (Z_e (x) K_e) x, Z_e = B A pruned.

    Args:
        y: what the update is added to; stays where no scale reaches.
        apart: x, taken apart by `branches`.
        weights: of the experts, those that `branches` was given.
        A: the widest seed.
        B: the widest seed.
        kernels: per scale.
        where: what `places` gives for this site.
    """
    features, source = apart
    device = features.device.type
    if torch.is_autocast_enabled(device):
        features = features.to(torch.get_autocast_dtype(device))
    if source is not None and not takes_apart_again(source, features):
        source = None
    updated: Tensor = _KroneckerUpdate.apply(y, features, source, weights.flatten(0, -2), A, B, *where, *kernels)  # type: ignore[no-untyped-call]
    return updated


class Apart(NamedTuple):
    """What the update reads of a site's input x.

    Attributes:
        features: those of each residue mod g beside each other, (groups, g, tokens, i_g); of the release's operator x.
        source: the x they were taken from, without its graph; None if they cannot be taken from it again.
    """

    features: Tensor
    source: Tensor | None = None


def takes_apart_again(source: Tensor, features: Tensor) -> bool:
    """Whether x is kept for backward, since others often keep it as well (attention its output, ReLU its own).

    Of T5 the features would be a quarter of what is kept. To take x apart again costs next to nothing where memory is
    fast, but 1.5 % of a step on a processor.
    """
    return source.device.type != "cpu" and source.dtype == features.dtype


class _KroneckerUpdate(torch.autograd.Function):
    """Both directions by hand: a third of autograd's kernels, most of them tiny, and half of what it keeps."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, apart: Tensor, source: Tensor | None, weights: Tensor, A: Tensor, B: Tensor, *rest: Tensor
    ) -> Tensor:
        where, kernels = Places(*rest[: len(Places._fields)]), rest[len(Places._fields) :]
        with torch.autocast(device_type=apart.device.type, enabled=False):
            both = spread(A.T, B, where).to(apart.dtype)
            down, up = both[:, : apart.shape[-1]], both[:, apart.shape[-1] :]
            numbers = torch.cat([*(kernel.flatten() for kernel in kernels), where.zero[0, :1]])
            bank = numbers.index_select(0, where.bank.flatten()).view(where.bank.shape)
            low = into_rank_space(apart, down)
            kernel = (weights @ bank.flatten(1)).view(-1, *bank.shape[1:]).to(low.dtype)
            kept = apart if source is None else source
            ctx.save_for_backward(kept, weights, down, up, bank, low, kernel, *where)
            ctx.again = source is not None
            ctx.i_s, ctx.kernels = A.shape[1], [each.shape for each in kernels]
            # As `data`, for autograd would not let a view made in here be changed in place, as Falcon does.
            return add_together(y, out_of_rank_space(mix(kernel, low), up).to(y.dtype)).data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weights, down, up, bank, low, kernel, *rest = ctx.saved_tensors
        where = Places(*rest)
        groups, g, _, tokens = low.shape
        with torch.autocast(device_type=grad.device.type, enabled=False):
            of_update = residues(grad.to(low.dtype).reshape(groups, tokens, -1), g)
            of_mixed = into_rank_space(of_update, up)
            # Cheaper made again than kept.
            of_up = of_factor(mix(kernel, low), of_update)
            of_low = mix(kernel.mT, of_mixed)
            of_down = of_factor(of_low, residues(kept.reshape(groups, tokens, -1), g) if ctx.again else kept)
            of_apart = out_of_rank_space(of_low, down) if ctx.needs_input_grad[1] else None
            flat = groups, bank.shape[-1], -1
            of_kernel = (of_mixed.view(flat) @ low.view(flat).mT).flatten(1).to(weights.dtype)
            of_weights = of_kernel @ bank.flatten(1).T
            numbers = (weights.T @ of_kernel).flatten().index_select(0, where.bank_back)
            split = numbers.split([shape.numel() for shape in ctx.kernels])
            of_A, of_B = collect(of_down, of_up, ctx.i_s, where)
        none = (None,) * len(Places._fields)
        of_kernels = (n.view(s) for n, s in zip(split, ctx.kernels, strict=True))
        return grad, of_apart, None, of_weights, of_A.T, of_B, *none, *of_kernels


def mix(kernel: Float[Tensor, "groups S S"], low: Float[Tensor, "groups g k tokens"]) -> Tensor:
    """K (x) I_r of every group applied to its tokens in rank space."""
    return torch.bmm(kernel, low.view(*kernel.shape[:2], -1)).view(low.shape)


def into_rank_space(
    apart: Float[Tensor, "groups g tokens d_g"], factor: Float[Tensor, "k d_g"]
) -> Float[Tensor, "groups g k tokens"]:
    """`factor` applied to every token's residues; tokens last, so that `mix` reads and writes them where they are."""
    groups, g, tokens, width = apart.shape
    if _multiply_first(apart, tokens):
        return transposed(F.linear(apart, factor))
    stack = apart.view(groups * g, tokens, width)
    return torch.bmm(factor.expand(groups * g, -1, -1), stack.mT).view(groups, g, -1, tokens)


def out_of_rank_space(
    low: Float[Tensor, "groups g k tokens"], factor: Float[Tensor, "k d_g"]
) -> Float[Tensor, "groups g tokens d_g"]:
    """The transposed `factor` applied to every token."""
    groups, g, k, tokens = low.shape
    if _multiply_first(low, tokens):
        return F.linear(transposed(low), factor.T)
    stack = low.view(groups * g, k, tokens)
    return torch.bmm(stack.mT, factor.expand(groups * g, -1, -1)).view(groups, g, tokens, -1)


def _multiply_first(x: Tensor, tokens: int) -> bool:
    """Whether all groups are multiplied as one matrix: they are small, or the product of groups would copy `factor`."""
    return tokens < FEW_TOKENS or (x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16))


def of_factor(
    low: Float[Tensor, "groups g k tokens"], apart: Float[Tensor, "groups g tokens d_g"]
) -> Float[Tensor, "k d_g"]:
    """Sum over tokens of outer products, as the factors' gradients are."""
    # This way round the product is faster than the other.
    return torch.mm(apart.flatten(0, 2).T, transposed(low).flatten(0, 2)).T


class Places(NamedTuple):
    """Where the numbers of seeds and kernels stand in the matrices that multiply, and where those come from.

    Indices into one side, for every place of the other; what is after the last is zero. To gather is one kernel, where
    copies scale by scale are dozens, at every site of every step. A and B, both of rows of r numbers, are gathered
    together: first the i of A, then the o of B.
    """

    seeds: Int[Tensor, "i_g_and_o_g M"]
    seeds_back: Int[Tensor, "i_s_and_o_s M"]
    bank: Int[Tensor, "experts S S"]
    bank_back: Int[Tensor, "numbers"]
    zero: Float[Tensor, "1 r"]


def places(
    kernels: Sequence[tuple[int, int]], rank: int, seed_widths: tuple[int, int], widths: tuple[int, int], g: int
) -> Places:
    """Places for one site.

    Args:
        kernels: how many and how large, scale by scale.
        rank: of the seed.
        seed_widths: columns of A, rows of B.
        widths: of the input and the output.
        g: divides all scales.
    """
    scales = [size // g for _, size in kernels]
    seeds = _seed_places(scales, seed_widths, (widths[0] // g, widths[1] // g))
    return Places(*seeds, *_kernel_places(kernels, g), torch.zeros(1, rank))


def _seed_places(scales: Sequence[int], seed_widths: tuple[int, int], widths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which column of a seed stands in which column and remainder of all its products with I_m, and the reverse."""
    M, after_all = sum(scales), sum(widths) * sum(scales)
    m = torch.tensor([m for m in scales for _ in range(m)])
    remainder = torch.tensor([k for m in scales for k in range(m)])
    backs, before = [], 0
    for seed_width, width in zip(seed_widths, widths, strict=True):
        row = torch.arange(seed_width).unsqueeze(1) * m + remainder
        backs.append(torch.where(row < width // m * m, (before + row) * M + torch.arange(M), after_all))
        before += width
    back = torch.cat(backs)
    there = torch.full((after_all + 1,), len(back))
    there[back] = torch.arange(len(back)).unsqueeze(1)
    return there[:-1].view(-1, M).int(), back.int()


def _kernel_places(kernels: Sequence[tuple[int, int]], g: int) -> tuple[Tensor, Tensor]:
    """Each expert's kernel on the diagonal at its scale's place, both sides sorted by residue mod `g`."""
    S = sum(size for _, size in kernels)
    squares, first, expert = [], 0, 0
    for count, size in kernels:
        feature = torch.arange(size)
        side = feature % g * (S // g) + first // g + feature // g
        experts = torch.arange(expert, expert + count).view(-1, 1, 1)
        squares.append(((experts * S + side.unsqueeze(1)) * S + side).flatten())
        first, expert = first + size, expert + count
    back = torch.cat(squares)
    there = torch.full((expert * S * S,), len(back))
    there[back] = torch.arange(len(back))
    return there.view(expert, S, S).int(), back.int()


def spread(A: Float[Tensor, "i_s r"], B: Float[Tensor, "o_s r"], where: Places) -> Float[Tensor, "k i_g_and_o_g"]:
    """Of each m among the scales seed (x) I_m, side by side and transposed; the ranks of a remainder stay together."""
    rows = torch.cat((A, B, where.zero)).index_select(0, where.seeds.flatten())
    return rows.view(len(where.seeds), -1).T


def collect(
    of_down: Float[Tensor, "k i_g"], of_up: Float[Tensor, "k o_g"], i_s: int, where: Places
) -> tuple[Float[Tensor, "i_s r"], Float[Tensor, "o_s r"]]:
    """The adjoint of `spread`: what gradients of its two parts are for the seeds."""
    rows = torch.cat([*(part.T.reshape(-1, where.zero.shape[1]) for part in (of_down, of_up)), where.zero])
    taken = rows.index_select(0, where.seeds_back.flatten()).view(*where.seeds_back.shape, -1).sum(dim=1)
    return taken[:i_s], taken[i_s:]


def branches(
    x: Float[Tensor, "rows *n d"],
    weights: Float[Tensor, "*some experts"],
    g: int,
    summed: Float[Tensor, "rows tokens"] | None = None,
) -> tuple[Float[Tensor, "rows *n d"], Apart, Float[Tensor, "rows d"] | None]:
    """What reads a site's input: the frozen layer, the update, and a sum over a row's tokens.

    Args:
        x: the input.
        weights: of the experts; tokens that have the same are one group.
        g: divides all scales.
        summed: weight of each token in the sum, if that is wanted.

    Returns:
        x, x taken apart, the sum: with one gradient, made in one pass.
    """
    for_base, features, mean = _Branches.apply(x, weights.dim() - 1, g, summed)  # type: ignore[no-untyped-call]
    return for_base, Apart(features, x.detach()), mean


class _Branches(torch.autograd.Function):
    """Three results, so that their gradients meet here and are added where they are made."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, leading: int, g: int, summed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(summed)
        groups = x.flatten(0, leading - 1)
        apart = residues(groups.flatten(1, -2) if groups.dim() > 2 else groups.unsqueeze(1), g)
        return x, apart, None if summed is None else (summed.unsqueeze(1) @ x.reshape(*summed.shape, -1)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, of_apart: Tensor, of_sum: Tensor | None) -> tuple[Tensor | None, ...]:
        (summed,) = ctx.saved_tensors
        of_x = add_together(grad, of_apart)
        if summed is not None and of_sum is not None:
            of_x.view(*summed.shape, -1).addcmul_(summed.unsqueeze(2), of_sum.unsqueeze(1))
        return of_x, None, None, None


def residues(x: Float[Tensor, "groups tokens d"], g: int) -> Float[Tensor, "groups g tokens d_g"]:
    """The features of each residue mod `g` beside each other; what is left of `d` over a multiple of `g` is dropped."""
    groups, tokens, width = x.shape[0], x.shape[1], x.shape[2] // g
    return transposed(x[..., : width * g].reshape(groups, tokens * width, g)).view(groups, g, tokens, width)


def add_together(y: Float[Tensor, "*n d"], apart: Float[Tensor, "groups g tokens d_g"]) -> Float[Tensor, "*n d"]:
    """y plus what is apart, each feature at its place; where that is narrower, plus zero."""
    whole = apart.shape[1] * apart.shape[3]
    update = transposed(apart.flatten(2)).view(*y.shape[:-1], whole)
    return F.pad(update, (0, y.shape[-1] - whole)).add_(y) if whole < y.shape[-1] else update.add_(y)


def transposed(x: Float[Tensor, "*n a b"]) -> Float[Tensor, "*n b a"]:
    """Copies in order: by torch's shuffle of channels where that is faster, in eager mode on a CPU, not in 16 bits."""
    if x.device.type != "cpu" or x.element_size() < 4 or torch.compiler.is_compiling() or x.numel() == 0:
        return x.mT.clone(memory_format=torch.contiguous_format)
    # As if the matrices were an image's positions, and their numbers its channels.
    *n, a, b = x.shape
    image = x.reshape(1, -1, 1, a * b).permute(0, 3, 1, 2)
    return torch.channel_shuffle(image, a).permute(0, 2, 3, 1).reshape(*n, b, a)


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
