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
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from moepeft.methods._fast.ept_products import (
    by_side,
    into_rank_space,
    mix,
    multiplies_together,
    of_factor,
    out_of_rank_space,
    sort_by_residue,
    unsort,
)
from moepeft.methods._fast.ept_runs import WHOLE, find_runs, paying
from moepeft.methods._fast.ept_tables import Tables, cached_tables
from moepeft.methods._pyramid import Once, Part, Pyramid, Ready, Runs
from moepeft.ops.linear import computing_type
from moepeft.ops.precision import without_autocast
from moepeft.ops.together import Together, alike


def make_ready(
    pyramids: Sequence[Pyramid],
    widths: Sequence[tuple[int, int]],
    gates: Sequence[Tensor] | None = None,
    tasks: Tensor | None = None,
) -> list[Ready]:
    """What the parameters of sites become, together: factors, kernels, and for gates of rows the gated kernels.

    Args:
        pyramids: of sites with kernels of the same shapes, on one device.
        widths: features of each site's input and output.
        gates: (rows, experts) of each site.
        tasks: of the rows.
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
            return [Ready(factors[number], each, None, WHOLE) for number, each in enumerate(together.apart(blocks))]
        stacked = together.stack(gates)
        gated = (stacked @ blocks).to(kind)
        runs = [WHOLE] * len(pyramids) if tasks is None else find_runs(stacked, tasks, scales, first.A.shape[0])
        return [
            Ready(factors[number], None, each, own)
            for number, (each, own) in enumerate(zip(together.apart(gated), runs, strict=True))
        ]


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
    g = math.gcd(*(kernel.shape[1] for kernel in pyramid.kernels))
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
    features, factors, kernel = features.to(kind), ready.factors.to(kind), kernel.to(kind)
    source = x.detach() if sorts_again(x, features, pyramid.input_is_kept) else None
    updated: Tensor = _AddPyramid.apply(  # type: ignore[no-untyped-call]
        y, features, source, factors, kernel, _runs_of(ready, features, y)
    )
    return updated


def _runs_of(ready: Ready, features: Float[Tensor, "groups g tokens i_g"], y: Tensor) -> Runs:
    """The runs that pay: not where groups are multiplied together, as runs are products by group."""
    if multiplies_together(features, features.shape[2]):
        return WHOLE
    return paying(ready.runs, features.numel() + y.numel())


def sorts_again(x: Tensor, features: Tensor, is_kept: bool) -> bool:
    """Whether backward sorts the features of x again, and keeps x in place of the sorted copy.

    Where another layer keeps x as well, keeping x costs no memory. The sorted copies are a quarter of what a T5 keeps.
    Sorting costs next to nothing on a GPU. On a CPU all inputs together cost 1.5 % of a training step.
    """
    return x.dtype == features.dtype and (is_kept or x.device.type != "cpu")


class _AddPyramid(torch.autograd.Function):
    """The three products of every run, and their gradients."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, features: Tensor, source: Tensor | None, factors: Tensor, kernel: Tensor, runs: Runs
    ) -> Tensor:
        lows, width = [], features.shape[-1]
        with without_autocast(features):
            update = _room(features, factors.shape[0] - 1 - width, runs)
            for rows, part in runs:
                down, up = _of_sides(_chosen(factors, part.columns), width)
                lows.append(into_rank_space(features[rows], down))
                mixed = mix(_square(_chosen(kernel[rows], part.numbers)), lows[-1])
                update = out_of_rank_space(mixed, up, update, rows)
            assert update is not None
            ctx.save_for_backward(features if source is None else source, factors, kernel, *lows)
            ctx.sorts_again, ctx.g, ctx.width = source is not None, features.shape[1], width
            ctx.runs = runs
            # As `data`: autograd would not let a view made in here be changed in place, as Falcon does.
            return unsort(update.to(y.dtype), y.shape).add_(y).data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, factors, kernel, *lows = ctx.saved_tensors
        g, width, runs = ctx.g, ctx.width, ctx.runs
        with without_autocast(grad):
            shape = len(kernel), lows[0].shape[-1]
            of_update = sort_by_residue(grad.to(factors.dtype).reshape(*shape, grad.shape[-1]), g)
            features = sort_by_residue(kept.reshape(*shape, kept.shape[-1]), g) if ctx.sorts_again else kept
            of_features = _room(features, width, runs) if ctx.needs_input_grad[1] else None
            sums = _Sums(factors, kernel, runs)
            for (rows, part), low in zip(runs, lows, strict=True):
                down, up = _of_sides(_chosen(factors, part.columns), width)
                K = _square(_chosen(kernel[rows], part.numbers))
                of_mixed = into_rank_space(of_update[rows], up)
                of_low = mix(K.mT, of_mixed)
                # The mixed rank space is cheaper made again than kept.
                of_up = of_factor(mix(K, low), of_update[rows])
                of_down = of_factor(of_low, features[rows])
                of_kernel = by_side(of_mixed, K.shape[1]) @ by_side(low, K.shape[1]).mT
                sums.add(rows, part, (of_down, of_up), of_kernel)
                if ctx.needs_input_grad[1]:
                    of_features = out_of_rank_space(of_low, down, of_features, rows)
        return grad, of_features, None, sums.factors, sums.kernel, None


class _Sums:
    """The gradients of factors and kernels, summed over runs."""

    def __init__(self, factors: Tensor, kernel: Tensor, runs: Runs) -> None:
        self.whole = runs is WHOLE
        if not self.whole:
            self.factors, self.kernel = torch.zeros_like(factors), torch.zeros_like(kernel)

    def add(self, rows: slice, part: Part, of_sides: tuple[Tensor, Tensor], of_kernel: Tensor) -> None:
        """Those of a run; of one with all scales they are the sum."""
        end = _zeros(of_sides[0].shape[1], of_sides[0].dtype, of_sides[0].device)
        of_factors = torch.cat((*of_sides, end))
        if self.whole:
            self.factors, self.kernel = of_factors, of_kernel.flatten(1)
        elif part.columns is None or part.numbers is None:
            self.factors += of_factors
            self.kernel[rows] = of_kernel.flatten(1)
        else:
            self.factors.index_add_(1, part.columns, of_factors)
            self.kernel[rows].index_copy_(1, part.numbers, of_kernel.flatten(1))


def _chosen(matrix: Tensor, columns: Tensor | None) -> Tensor:
    # Indexing by [:, columns] takes five times as long.
    return matrix if columns is None else matrix.index_select(1, columns)


def _room(features: Tensor, width: int, runs: Runs) -> Tensor | None:
    """Where several runs write their sorted features; a single one makes its own."""
    return features.new_empty(*features.shape[:-1], width) if len(runs) > 1 else None


def _square(kernel: Float[Tensor, "groups S_S"]) -> Float[Tensor, "groups S S"]:
    S = math.isqrt(kernel.shape[1])
    return kernel.view(len(kernel), S, S)


def _of_sides(factors: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`down` and `up`."""
    return factors[:width].T, factors[width:-1].T


@functools.lru_cache(maxsize=64)
def _zeros(number: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A row of zeros, made once: the first caller may be in inference mode, and later ones train."""
    with torch.inference_mode(False):
        return torch.zeros(1, number, dtype=dtype, device=device)


class _SortedByResidue(torch.autograd.Function):
    """x (rows, *n, i) as (groups, g, tokens, i // g); the first `leading` dimensions of x are the groups."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leading: int, g: int) -> Tensor:
        ctx.shape = x.shape
        groups, tokens = x.shape[:leading].numel(), x.shape[leading:-1].numel()
        return sort_by_residue(x.reshape(groups, tokens, x.shape[-1]), g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return unsort(grad, ctx.shape), None, None
