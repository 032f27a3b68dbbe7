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

**Forward and backward are written by hand.** Autograd would launch three times as many kernels, most of them tiny, and
keep twice as much for backward. torch.compile fuses the definition instead, so compiled graphs hold the definition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from moepeft.methods._fast.ept_tables import Tables, cached_tables
from moepeft.methods._pyramid import Once, Pyramid

# A product per group needs no sorting of its result. Groups with fewer tokens are faster multiplied together.
FEW_TOKENS = 16


def add_pyramid(
    y: Float[Tensor, "rows *n o"],
    x: Float[Tensor, "rows *n i"],
    gates: Float[Tensor, "rows *some experts"],
    pyramid: Pyramid,
    once: Once | None = None,
) -> Float[Tensor, "rows *n o"]:
    """`moepeft.methods.ept.add_pyramid`, once differentiable; `once` sorts the features for all sites that read x."""
    A, B, kernels, factors = pyramid
    scales = tuple((kernel.shape[0], kernel.shape[1]) for kernel in kernels)
    g = math.gcd(*(size for _, size in scales))

    def sort() -> Tensor:
        features: Tensor = _SortedByResidue.apply(x, gates.dim() - 1, g)  # type: ignore[no-untyped-call]
        return features

    features = sort() if once is None else once("residues", x, sort)
    widths = x.shape[-1], y.shape[-1]
    where = cached_tables(scales, tuple(factors), (A.shape[1], B.shape[0]), widths, A.shape[0], A.dtype, A.device)
    device = features.device.type
    if torch.is_autocast_enabled(device):
        features = features.to(torch.get_autocast_dtype(device))
    source = x.detach() if sorts_again(x, features) else None
    weights = gates.flatten(0, -2) * where.factors.to(gates.dtype)
    updated: Tensor = _AddPyramid.apply(y, features, source, weights, A, B, *where, *kernels)  # type: ignore[no-untyped-call]
    return updated


def sorts_again(x: Tensor, features: Tensor) -> bool:
    """Whether backward sorts the features of x again, and keeps x in place of the sorted copy.

    Other layers often keep x as well, so that keeping x costs no memory. The sorted copies are a quarter of what a T5
    keeps. Sorting costs next to nothing on a GPU, and 1.5 % of a training step on a CPU.
    """
    return x.device.type != "cpu" and x.dtype == features.dtype


class _AddPyramid(torch.autograd.Function):
    """The three products, and their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        features: Tensor,
        source: Tensor | None,
        weights: Tensor,
        A: Tensor,
        B: Tensor,
        *more: Tensor,
    ) -> Tensor:
        where, kernels = Tables(*more[: len(Tables._fields)]), more[len(Tables._fields) :]
        with torch.autocast(device_type=features.device.type, enabled=False):
            widths = features.shape[-1], y.shape[-1] // features.shape[1]
            down, up = spread_seeds(A, B, where, widths, features.dtype)
            numbers = torch.cat([*(kernel.flatten() for kernel in kernels), where.zeros[0, :1]])
            S = sum(each.shape[-1] for each in kernels)
            blocks = numbers.index_select(0, where.blocks).view(-1, S, S)
            low = into_rank_space(features, down)
            kernel = (weights @ blocks.flatten(1)).view(-1, *blocks.shape[1:]).to(low.dtype)
            kept = features if source is None else source
            ctx.save_for_backward(kept, weights, down, up, blocks, low, kernel, *where)
            ctx.sorts_again = source is not None
            ctx.seed_widths, ctx.kernel_shapes = (A.shape[1], B.shape[0]), [each.shape for each in kernels]
            # As `data`: autograd would not let a view made in here be changed in place, as Falcon does.
            return add_unsorted(y, out_of_rank_space(mix(kernel, low), up).to(y.dtype)).data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weights, down, up, blocks, low, kernel, *rest = ctx.saved_tensors
        where = Tables(*rest)
        groups, g, _, tokens = low.shape
        with torch.autocast(device_type=grad.device.type, enabled=False):
            of_update = sort_by_residue(grad.to(low.dtype).reshape(groups, tokens, -1), g)
            of_mixed = into_rank_space(of_update, up)
            # The mixed rank space is cheaper made again than kept.
            of_up = of_factor(mix(kernel, low), of_update)
            of_low = mix(kernel.mT, of_mixed)
            features = sort_by_residue(kept.reshape(groups, tokens, -1), g) if ctx.sorts_again else kept
            of_down = of_factor(of_low, features)
            of_features = out_of_rank_space(of_low, down) if ctx.needs_input_grad[1] else None
            flat = groups, blocks.shape[-1], -1
            of_kernel = (of_mixed.view(flat) @ low.view(flat).mT).flatten(1).to(weights.dtype)
            of_weights = of_kernel @ blocks.flatten(1).T
            numbers = (weights.T @ of_kernel).flatten().index_select(0, where.from_blocks)
            split = numbers.split([shape.numel() for shape in ctx.kernel_shapes])
            of_A, of_B = collect_seeds(of_down, of_up, ctx.seed_widths, where)
        none = (None,) * len(Tables._fields)
        of_kernels = (part.view(shape) for part, shape in zip(split, ctx.kernel_shapes, strict=True))
        return grad, of_features, None, of_weights, of_A, of_B, *none, *of_kernels


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
) -> Float[Tensor, "k d_g"]:
    """Gradient of a factor: the sum over tokens of outer products."""
    # This way round the product is faster than the other.
    return torch.mm(features.flatten(0, 2).T, transpose(low).flatten(0, 2)).T


def spread_seeds(
    A: Float[Tensor, "r i_s"], B: Float[Tensor, "o_s r"], where: Tables, widths: tuple[int, int], dtype: torch.dtype
) -> tuple[Float[Tensor, "k i_g"], Float[Tensor, "k o_g"]]:
    """`down` and `up`, of those widths and that type, gathered together."""
    rows = torch.cat((A.T, B, where.zeros)).index_select(0, where.seeds).to(dtype)
    down, up = torch.split(rows.view(sum(widths), -1).T, [*widths], dim=1)
    return down, up


def collect_seeds(
    of_down: Float[Tensor, "k i_g"], of_up: Float[Tensor, "k o_g"], seed_widths: tuple[int, int], where: Tables
) -> tuple[Float[Tensor, "r i_s"], Float[Tensor, "o_s r"]]:
    """The adjoint of `spread_seeds`: gradients of the seeds from those of the factors."""
    r = where.zeros.shape[1]
    rows = torch.cat([*(part.T.reshape(-1, r) for part in (of_down, of_up)), where.zeros])
    summed = rows.index_select(0, where.from_seeds).view(sum(seed_widths), -1, r).sum(dim=1)
    of_A, of_B = torch.split(summed, [*seed_widths])
    return of_A.T, of_B


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
