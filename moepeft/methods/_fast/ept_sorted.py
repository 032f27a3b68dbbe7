"""The sorted form of EPT's fast path: products without the zeros of the factors, and of the chosen scales alone.

**Residues.** Let g divide all scales and m = s / g. A (x) I_s multiplies the features of each residue mod g by the same
matrix A (x) I_m. So the features are sorted by residue first, and both products need one operation in g.

**Shapes.** A group is the tokens that share gates: a row, or a single token where tokens are routed. M is the sum of
the m over all scales, S = g M is the sum of the scales.

    sorted features   (groups, g, tokens, i // g)
    down, up          (i // g, M r), (o // g, M r)       A (x) I_m and B (x) I_m of all scales, the first transposed
    rank space        (groups, g, M r, tokens)           tokens last: the kernels read and write them in place
    gated kernels     (groups, S, S)                     block-diagonal, one block per scale

**Runs.** `moepeft.methods._fast.ept_runs` says which rows use which scales.

**Forward and backward of the products are written by hand.** Autograd would launch three times as many kernels, most of
them tiny, and keep twice as much for backward.
"""

from __future__ import annotations

import math
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
from moepeft.methods._fast.ept_runs import WHOLE, paying
from moepeft.methods._pyramid import Once, Part, Ready, Runs
from moepeft.ops.linear import computing_type
from moepeft.ops.precision import without_autocast


def add_sorted(
    y: Float[Tensor, "rows *n o"],
    x: Float[Tensor, "rows *n i"],
    kernel: Float[Tensor, "groups S S"],
    ready: Ready,
    leading: int,
    is_kept: bool,
    once: Once | None,
) -> Float[Tensor, "rows *n o"]:
    """y plus the update, once differentiable.

    Args:
        y: the frozen layer's output.
        x: its input.
        kernel: gated.
        ready: the factors, and the runs.
        leading: how many dimensions of x are groups.
        is_kept: `Pyramid.input_is_kept`.
        once: sorts the features for all sites that read x.
    """
    g = ready.g
    assert g is not None

    def sort() -> Tensor:
        features: Tensor = _SortedByResidue.apply(x, leading, g)  # type: ignore[no-untyped-call]
        return features

    features = sort() if once is None else once("residues", x, sort)
    kind = computing_type(features)
    features, down, up, kernel = (each.to(kind) for each in (features, ready.down, ready.up, kernel))
    # Backward sorts x again where another layer keeps x: the sorted copies are a quarter of what a T5 keeps, and to
    # make them takes 1.5 % of a training step.
    source = x.detach() if is_kept and x.dtype == kind else None
    runs = _runs_of(ready, features, y)
    updated: Tensor = _AddSorted.apply(y, features, source, runs, down, up, kernel)  # type: ignore[no-untyped-call]
    return updated


def _runs_of(ready: Ready, features: Float[Tensor, "groups g tokens i_g"], y: Tensor) -> Runs:
    """The runs that pay: not where groups are multiplied together, as runs are products by group."""
    if multiplies_together(features, features.shape[2]):
        return WHOLE
    return paying(ready.runs, features.numel() + y.numel())


class _AddSorted(torch.autograd.Function):
    """The three products of every run, and their gradients."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, features: Tensor, source: Tensor | None, runs: Runs, *matrices: Tensor) -> Tensor:
        (down, up, kernel), lows = matrices, []
        with without_autocast(features):
            update = _room(features, up.shape[0], runs)
            for rows, part in runs:
                lows.append(into_rank_space(features[rows], _chosen(down, part.columns).T))
                mixed = mix(_gated(kernel[rows], part.numbers), lows[-1])
                update = out_of_rank_space(mixed, _chosen(up, part.columns).T, update, rows)
            assert update is not None
            ctx.save_for_backward(features if source is None else source, down, up, kernel, *lows)
            ctx.sorts_again, ctx.g, ctx.runs = source is not None, features.shape[1], runs
            # As `data`: autograd would not let a view made in here be changed in place, as Falcon does.
            return unsort(update.to(y.dtype), y.shape).add_(y).data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, down, up, kernel, *lows = ctx.saved_tensors
        g, runs = ctx.g, ctx.runs
        with without_autocast(grad):
            shape = len(kernel), lows[0].shape[-1]
            of_update = sort_by_residue(grad.to(up.dtype).reshape(*shape, grad.shape[-1]), g)
            features = sort_by_residue(kept.reshape(*shape, kept.shape[-1]), g) if ctx.sorts_again else kept
            of_features = _room(features, down.shape[0], runs) if ctx.needs_input_grad[1] else None
            sums = _Sums(down, up, kernel, runs)
            for (rows, part), low in zip(runs, lows, strict=True):
                K = _gated(kernel[rows], part.numbers)
                of_mixed = into_rank_space(of_update[rows], _chosen(up, part.columns).T)
                of_low = mix(K.mT, of_mixed)
                # The mixed rank space is cheaper made again than kept.
                of_up = of_factor(mix(K, low), of_update[rows])
                of_down = of_factor(of_low, features[rows])
                of_kernel = by_side(of_mixed, K.shape[1]) @ by_side(low, K.shape[1]).mT
                sums.add(rows, part, of_down, of_up, of_kernel)
                if ctx.needs_input_grad[1]:
                    of_features = out_of_rank_space(of_low, _chosen(down, part.columns).T, of_features, rows)
        return grad, of_features, None, None, sums.down, sums.up, sums.kernel


class _Sums:
    """The gradients of factors and kernels, summed over runs."""

    def __init__(self, down: Tensor, up: Tensor, kernel: Tensor, runs: Runs) -> None:
        self.whole = runs is WHOLE
        if not self.whole:
            self.down, self.up, self.kernel = torch.zeros_like(down), torch.zeros_like(up), torch.zeros_like(kernel)

    def add(self, rows: slice, part: Part, of_down: Tensor, of_up: Tensor, of_kernel: Tensor) -> None:
        """Those of a run; of one with all scales they are the sum."""
        if self.whole:
            self.down, self.up, self.kernel = of_down, of_up, of_kernel
        elif part.columns is None or part.numbers is None:
            self.down += of_down
            self.up += of_up
            self.kernel[rows] = of_kernel
        else:
            self.down.index_add_(1, part.columns, of_down)
            self.up.index_add_(1, part.columns, of_up)
            self.kernel[rows].flatten(1).index_copy_(1, part.numbers, of_kernel.flatten(1))


def _chosen(matrix: Tensor, columns: Tensor | None) -> Tensor:
    # Indexing by [:, columns] takes five times as long.
    return matrix if columns is None else matrix.index_select(1, columns)


def _gated(kernel: Float[Tensor, "groups S S"], numbers: Tensor | None) -> Float[Tensor, "groups s s"]:
    """The kernels between the chosen scales."""
    if numbers is None:
        return kernel
    side = math.isqrt(len(numbers))
    return kernel.flatten(1).index_select(1, numbers).view(len(kernel), side, side)


def _room(features: Tensor, width: int, runs: Runs) -> Tensor | None:
    """Where several runs write their sorted features; a single one makes its own."""
    return features.new_empty(*features.shape[:-1], width) if len(runs) > 1 else None


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
