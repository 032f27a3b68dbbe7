"""Fast path of `moepeft.methods.ept.add_pyramid`: the same values and gradients from three products.

**Three products.** By the mixed-product rule of Kronecker products

    (B A) (x) K  =  (B (x) I_s) (I_r (x) K) (A (x) I_s)

a scale s is a LoRA of rank r s. Its two factors are structured, and its kernel acts in the rank space. The factors of
all scales stand side by side: one product down, one by the gated kernels in the rank space, one product up.

**Residues.** Let g divide all scales and m = s / g. A (x) I_s multiplies the features of each residue mod g by the same
matrix A (x) I_m. So the features are sorted by residue first, and both products need one operation in g.

**Shapes.** A group is the tokens that share gates: a row, or a single token where tokens are routed. M is the sum of
the m over all scales, S = g M is the sum of the scales.

    sorted features   (groups, g, tokens, i // g)
    down, up          (M r, i // g), (M r, o // g)       A (x) I_m and the transposed B (x) I_m of all scales
    rank space        (groups, g, M r, tokens)           tokens last: the kernels read and write them in place
    gated kernels     (groups, S, S)                     block-diagonal, one block per scale

**Parameters first.** Factors and gated kernels depend on parameters and tasks alone. `make_ready` makes them for all
sites together.

**Forward and backward of the products are written by hand.** Autograd would launch three times as many kernels, most of
them tiny, and keep twice as much for backward. torch.compile fuses the definition instead, so compiled graphs hold the
definition.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from moepeft.methods._fast.ept_tables import Tables, cached_tables
from moepeft.methods._pyramid import Once, Pyramid, Ready
from moepeft.ops.linear import computing_type
from moepeft.ops.precision import without_autocast
from moepeft.ops.together import Together, alike

# A product per group needs no sorting of its result. Groups with fewer tokens are faster multiplied together.
FEW_TOKENS = 16


def make_ready(
    pyramids: Sequence[Pyramid], widths: Sequence[tuple[int, int]], gates: Sequence[Tensor] | None = None
) -> list[Ready]:
    """What the parameters of sites become, together: factors, kernels, and for gates of rows the gated kernels.

    Args:
        pyramids: of sites with kernels of the same shapes, on one device.
        widths: features of each site's input and output.
        gates: (rows, experts) of each site.
    """
    first, together = pyramids[0], Together(len(pyramids))
    scales = tuple((len(kernel), kernel.shape[1]) for kernel in first.kernels)
    kind = computing_type(first.A)
    factors: dict[int, Tensor] = {}
    with without_autocast(first.A):
        for group in alike(
            [(each.A.shape, each.B.shape, *sides) for each, sides in zip(pyramids, widths, strict=True)]
        ):
            A = together.stack([pyramids[number].A for number in group], group)
            B = together.stack([pyramids[number].B for number in group], group)
            sides = widths[group[0]]
            where = cached_tables(scales, (A.shape[2], B.shape[1]), sides, len(group), A.device)
            spread = spread_seeds(A, B, where)
            factors.update(zip(group, together.apart(spread.to(kind), group), strict=True))
        kernels = [together.stack([each.kernels[scale] for each in pyramids]) for scale in range(len(scales))]
        of_scales = [kernel.flatten(1) * factor for kernel, factor in zip(kernels, first.factors, strict=True)]
        blocks = spread_kernels(torch.cat(of_scales, dim=1), where.blocks, scales)
        if gates is None:
            return [Ready(factors[number], each, None) for number, each in enumerate(together.apart(blocks))]
        gated = (together.stack(gates) @ blocks).to(kind)
        return [Ready(factors[number], None, each) for number, each in enumerate(together.apart(gated))]


def spread_seeds(
    A: Float[Tensor, "sites r i_s"], B: Float[Tensor, "sites o_s r"], where: Tables
) -> Float[Tensor, "sites rows_and_one k"]:
    """The transposed factors `down` and `up` below each other, and a row of zeros, which the pruned columns lead to."""
    sites, r = A.shape[:2]
    seeds = torch.cat((A.mT, B, _zeros(r, A.dtype, A.device).expand(sites, 1, r)), dim=1)
    copies: Tensor = _Gathered.apply(seeds.flatten(0, 1), where.seeds, where.from_seeds)  # type: ignore[no-untyped-call]
    return copies.view(sites, -1, len(where.from_seeds) // (seeds.shape[0] * seeds.shape[1]) * r)


class _Gathered(torch.autograd.Function):
    """Rows by number, where it is known which places a row was copied to: autograd would add them up one by one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.number = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places).view(ctx.number, -1, grad.shape[1]).sum(dim=1), None, None


def spread_kernels(
    numbers: Float[Tensor, "sites numbers"], index: Tensor, scales: Sequence[tuple[int, int]]
) -> Float[Tensor, "sites experts S_S"]:
    """The experts' block-diagonal matrices: a block of each where its scale stands, flat."""
    experts, S = sum(count for count, _ in scales), sum(size for _, size in scales)
    places = numbers.new_zeros(len(numbers), experts * S * S)
    return places.scatter(1, index.expand_as(numbers), numbers).view(len(numbers), experts, S * S)


def add_pyramid(
    y: Float[Tensor, "rows *n o"],
    x: Float[Tensor, "rows *n i"],
    gates: Float[Tensor, "rows *some experts"],
    pyramid: Pyramid,
    once: Once | None = None,
) -> Float[Tensor, "rows *n o"]:
    """`moepeft.methods.ept.add_pyramid`, once differentiable; `once` sorts the features for all sites that read x."""
    sizes = [kernel.shape[1] for kernel in pyramid.kernels]
    g, S = math.gcd(*sizes), sum(sizes)
    ready = pyramid.ready or make_ready([pyramid], [(x.shape[-1], y.shape[-1])])[0]
    kernel = ready.kernel
    if kernel is None:
        assert ready.blocks is not None
        with without_autocast(gates):
            kernel = gates.flatten(0, -2) @ ready.blocks

    def sort() -> Tensor:
        features: Tensor = _SortedByResidue.apply(x, gates.dim() - 1, g)  # type: ignore[no-untyped-call]
        return features

    features = sort() if once is None else once("residues", x, sort)
    kind = computing_type(features)
    features, factors, kernel = features.to(kind), ready.factors.to(kind), kernel.to(kind).view(-1, S, S)
    source = x.detach() if sorts_again(x, features, pyramid.input_is_kept) else None
    updated: Tensor = _AddPyramid.apply(y, features, source, factors, kernel)  # type: ignore[no-untyped-call]
    return updated


def sorts_again(x: Tensor, features: Tensor, is_kept: bool) -> bool:
    """Whether backward sorts the features of x again, and keeps x in place of the sorted copy.

    Where another layer keeps x as well, keeping x costs no memory. The sorted copies are a quarter of what a T5 keeps.
    Sorting costs next to nothing on a GPU. On a CPU all inputs together cost 1.5 % of a training step.
    """
    return x.dtype == features.dtype and (is_kept or x.device.type != "cpu")


class _AddPyramid(torch.autograd.Function):
    """The three products, and their gradients."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, features: Tensor, source: Tensor | None, factors: Tensor, kernel: Tensor
    ) -> Tensor:
        with without_autocast(features):
            down, up = _of_sides(factors, features.shape[-1])
            low = into_rank_space(features, down)
            ctx.save_for_backward(features if source is None else source, factors, low, kernel)
            ctx.sorts_again, ctx.width = source is not None, features.shape[-1]
            # As `data`: autograd would not let a view made in here be changed in place, as Falcon does.
            return add_unsorted(y, out_of_rank_space(mix(kernel, low), up).to(y.dtype)).data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, factors, low, kernel = ctx.saved_tensors
        groups, g, k, tokens = low.shape
        with without_autocast(grad):
            down, up = _of_sides(factors, ctx.width)
            of_update = sort_by_residue(grad.to(low.dtype).reshape(groups, tokens, -1), g)
            of_mixed = into_rank_space(of_update, up)
            # The mixed rank space is cheaper made again than kept.
            of_up = of_factor(mix(kernel, low), of_update)
            of_low = mix(kernel.mT, of_mixed)
            features = sort_by_residue(kept.reshape(groups, tokens, -1), g) if ctx.sorts_again else kept
            of_down = of_factor(of_low, features)
            of_features = out_of_rank_space(of_low, down) if ctx.needs_input_grad[1] else None
            flat = groups, kernel.shape[-1], -1
            of_kernel = of_mixed.view(flat) @ low.view(flat).mT
            of_factors = torch.cat((of_down, of_up, _zeros(k, low.dtype, low.device)))
        return grad, of_features, None, of_factors, of_kernel


def _of_sides(factors: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`down` and `up`."""
    return factors[:width].T, factors[width:-1].T


@functools.lru_cache(maxsize=64)
def _zeros(number: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A row of zeros, made once: the first caller may be in inference mode, and later ones train."""
    with torch.inference_mode(False):
        return torch.zeros(1, number, dtype=dtype, device=device)


def mix(kernel: Float[Tensor, "groups S S"], low: Float[Tensor, "groups g k tokens"]) -> Tensor:
    """K (x) I_r of every group, applied to the group's tokens in the rank space."""
    return torch.bmm(kernel, low.view(*kernel.shape[:2], -1)).view(low.shape)


def into_rank_space(
    features: Float[Tensor, "groups g tokens d_g"], factor: Float[Tensor, "k d_g"]
) -> Float[Tensor, "groups g k tokens"]:
    """`factor` applied to the sorted features of every token."""
    groups, g, tokens, width = features.shape
    if _multiply_together(features, tokens):
        return transpose(F.linear(features, factor))
    stack = features.view(groups * g, tokens, width)
    return torch.bmm(factor.expand(groups * g, -1, -1), stack.mT).view(groups, g, -1, tokens)


def out_of_rank_space(
    low: Float[Tensor, "groups g k tokens"], factor: Float[Tensor, "k d_g"]
) -> Float[Tensor, "groups g tokens d_g"]:
    """The transposed `factor` applied to every token."""
    groups, g, k, tokens = low.shape
    if _multiply_together(low, tokens):
        return F.linear(transpose(low), factor.T)
    stack = low.view(groups * g, k, tokens)
    return torch.bmm(stack.mT, factor.expand(groups * g, -1, -1)).view(groups, g, tokens, -1)


def _multiply_together(x: Tensor, tokens: int) -> bool:
    """Whether all groups are one matrix: groups are small, or the product by groups would copy the factor."""
    return tokens < FEW_TOKENS or (x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16))


def of_factor(
    low: Float[Tensor, "groups g k tokens"], features: Float[Tensor, "groups g tokens d_g"]
) -> Float[Tensor, "d_g k"]:
    """Gradient of a transposed factor: the sum over tokens of outer products."""
    return torch.mm(features.flatten(0, 2).T, transpose(low).flatten(0, 2))


class _SortedByResidue(torch.autograd.Function):
    """x (rows, *n, i) as (groups, g, tokens, i // g); the first `leading` dimensions of x are the groups."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leading: int, g: int) -> Tensor:
        ctx.shape = x.shape
        groups = x.flatten(0, leading - 1)
        return sort_by_residue(groups.flatten(1, -2) if groups.dim() > 2 else groups.unsqueeze(1), g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return unsort(grad, ctx.shape), None, None


def sort_by_residue(x: Float[Tensor, "groups tokens d"], g: int) -> Float[Tensor, "groups g tokens d_g"]:
    """The features of each residue mod `g` beside each other; features after the last multiple of `g` are dropped."""
    groups, tokens, width = x.shape[0], x.shape[1], x.shape[2] // g
    return transpose(x[..., : width * g].reshape(groups, tokens * width, g)).view(groups, g, tokens, width)


def unsort(features: Float[Tensor, "groups g tokens d_g"], shape: Sequence[int]) -> Tensor:
    """A new tensor of `shape` with every feature at its place, and zeros where there is none."""
    whole = features.shape[1] * features.shape[3]
    placed = transpose(features.flatten(2)).view(*shape[:-1], whole)
    return F.pad(placed, (0, shape[-1] - whole)) if whole < shape[-1] else placed  # an empty pad would copy


def add_unsorted(y: Float[Tensor, "*n d"], features: Float[Tensor, "groups g tokens d_g"]) -> Float[Tensor, "*n d"]:
    """y plus the features, each at its place; in place on the copy that sorts them."""
    return unsort(features, y.shape).add_(y)


def transpose(x: Float[Tensor, "*n a b"]) -> Float[Tensor, "*n b a"]:
    """A transposed copy.

    On a CPU torch copies faster with its shuffle of channels, but not in 16 bits.
    """
    if x.device.type != "cpu" or x.element_size() < 4 or x.numel() == 0:
        return x.mT.clone(memory_format=torch.contiguous_format)
    # The matrices are taken as the positions of an image, and their numbers as its channels.
    *n, a, b = x.shape
    image = x.contiguous().view(1, -1, 1, a * b).permute(0, 3, 1, 2)
    return torch.channel_shuffle(image, a).permute(0, 2, 3, 1).reshape(*n, b, a)
