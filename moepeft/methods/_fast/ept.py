"""Fast path of `moepeft.methods.ept.add_pyramid`: the same values and gradients from three products.

By the mixed-product rule of Kronecker products

    (B A) (x) K  =  (B (x) I_s) (I_r (x) K) (A (x) I_s)

a scale s is a LoRA of rank r s. Its two factors are structured, and its kernel acts in the rank space. The factors of
all scales stand side by side: one product down, one by the gated kernels in the rank space, one product up.

**Two forms.** The factors are mostly zeros. The *plain* form multiplies by them as they are: a LoRA of rank r S, where
S is the sum of the scales, with a product in its middle. The *sorted* form, `moepeft.methods._fast.ept_sorted`, leaves
out zeros, and scales that no gate of a row has chosen. It needs more operations, and each of them takes time however
small it is. So the sorted form is for wide layers on a CPU.

    down, up         (r S, i), (o, r S)       A (x) I_s and B (x) I_s of all scales
    rank space       (groups, r tokens, S)    a group is the tokens that share gates: a row, or a single token
    gated kernels    (groups, S, S)           block-diagonal, one block per scale, transposed

**Parameters first.** Factors and gated kernels depend on parameters and tasks alone. `make_ready` makes them for all
sites together.

torch.compile fuses the definition instead, so compiled graphs hold the definition.
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

from moepeft.methods._fast.ept_runs import WHOLE, find_runs
from moepeft.methods._fast.ept_sorted import add_sorted
from moepeft.methods._fast.ept_tables import Scales, block_table, seed_tables
from moepeft.methods._pyramid import Once, Pyramid, Ready
from moepeft.ops.linear import add_linear, computing_type
from moepeft.ops.precision import without_autocast
from moepeft.ops.together import Together, alike

WIDE = 192
"""A layer is wide whose input and output have so many features together: from there the sorted form is faster."""

Widths = tuple[int, int]
"""Features of a site's input and of its output."""


def is_plain(device: torch.device, widths: Widths) -> bool:
    """Whether a layer takes the plain form."""
    return device.type != "cpu" or sum(widths) < WIDE


def make_ready(
    pyramids: Sequence[Pyramid],
    widths: Sequence[Widths],
    gates: Sequence[Tensor] | None = None,
    tasks: Tensor | None = None,
) -> list[Ready]:
    """What the parameters of sites become, together: factors, kernels, and for gates of rows the gated kernels.

    Args:
        pyramids: of sites with kernels of the same shapes, on one device.
        widths: of each site.
        gates: (rows, experts) of each site.
        tasks: of the rows.
    """
    first, ready = pyramids[0], dict[int, Ready]()
    with without_autocast(first.A):
        for sites in alike([is_plain(first.A.device, sides) for sides in widths]):
            made = _of_one_form(
                [pyramids[site] for site in sites],
                [widths[site] for site in sites],
                None if gates is None else [gates[site] for site in sites],
                tasks,
            )
            ready.update(zip(sites, made, strict=True))
    return [ready[site] for site in range(len(pyramids))]


def _of_one_form(
    pyramids: Sequence[Pyramid], widths: Sequence[Widths], gates: Sequence[Tensor] | None, tasks: Tensor | None
) -> list[Ready]:
    first, together, every = pyramids[0], Together(len(pyramids)), range(len(pyramids))
    scales, kind = tuple((len(kernel), kernel.shape[1]) for kernel in first.kernels), computing_type(first.A)
    g = None if is_plain(first.A.device, widths[0]) else math.gcd(*(size for _, size in scales))
    groups = alike([(each.A.shape, each.B.shape, *sides) for each, sides in zip(pyramids, widths, strict=True)])
    stacked = together.stack(
        *({site: pyramids[site].A for site in group} for group in groups),
        *({site: pyramids[site].B for site in group} for group in groups),
        *({site: pyramids[site].kernels[scale] for site in every} for scale in range(len(scales))),
        *([] if gates is None else [dict(enumerate(gates))]),
    )
    As, Bs, kernels = stacked[: len(groups)], stacked[len(groups) : 2 * len(groups)], stacked[2 * len(groups) :]
    factors = [spread_seeds(A, B, scales, widths[group[0]], g) for A, B, group in zip(As, Bs, groups, strict=True)]
    numbers = torch.cat([kernel.flatten(1) for kernel in kernels[: len(scales)]], dim=1)
    of_numbers = _factors_of_numbers(scales, tuple(first.factors), numbers.dtype, numbers.device)
    blocks = spread_kernels(numbers * of_numbers, scales, g)
    gated = blocks if gates is None else _square((stacked[-1] @ blocks).to(kind), g)
    of_kernels, *of_sides = together.apart(
        (every, gated),
        *((group, side.to(kind)) for sides, group in zip(factors, groups, strict=True) for side in sides),
    )
    down = {site: matrix for own in of_sides[::2] for site, matrix in own.items()}
    up = {site: matrix for own in of_sides[1::2] for site, matrix in own.items()}
    if gates is None:
        return [Ready(down[site], up[site], of_kernels[site], None, WHOLE, g) for site in every]
    runs = [WHOLE] * len(pyramids)
    if g is not None and tasks is not None:
        runs = find_runs(stacked[-1], tasks, scales, len(first.A))
    return [Ready(down[site], up[site], None, of_kernels[site], runs[site], g) for site in every]


@functools.lru_cache(maxsize=64)
def _factors_of_numbers(
    scales: Scales, factors: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "numbers"]:
    """f_e of every number of the kernels."""
    with torch.inference_mode(False):
        parts = [[f] * (count * size**2) for (count, size), f in zip(scales, factors, strict=True)]
        return torch.tensor([f for own in parts for f in own], dtype=dtype, device=device)


def spread_seeds(
    A: Float[Tensor, "sites r i_s"],
    B: Float[Tensor, "sites o_s r"],
    scales: Scales,
    widths: Widths,
    g: int | None,
) -> tuple[Tensor, Tensor]:
    """The factors `down` and `up` of all sites, as the form has them."""
    sites, r, i_s = A.shape
    index, places = seed_tables(scales, (i_s, B.shape[1]), widths, g or 1, A.device)
    # Columns of A and rows of B both are r numbers of every site. The last row is zero: the pruned lead to it.
    seeds = torch.cat((A.permute(2, 0, 1), B.transpose(0, 1), A.new_zeros(1, sites, r))).flatten(1)
    copies: Tensor = _Gathered.apply(seeds, index, places)  # type: ignore[no-untyped-call]
    of_sides = [*(width // (g or 1) for width in widths), 1]
    down, up, _ = torch.split(copies.view(sum(of_sides), -1, sites, r), of_sides)
    if g is None:
        return down.permute(2, 3, 1, 0).flatten(1, 2), up.permute(2, 0, 3, 1).flatten(2)
    return down.permute(2, 0, 1, 3).flatten(2), up.permute(2, 0, 1, 3).flatten(2)


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
    numbers: Float[Tensor, "sites numbers"], scales: Scales, g: int | None
) -> Float[Tensor, "sites experts S_S"]:
    """The experts' block-diagonal matrices: a block of each where its scale stands, flat."""
    experts, S = sum(count for count, _ in scales), sum(size for _, size in scales)
    index = block_table(scales, g or 1, numbers.device)
    places = numbers.new_zeros(len(numbers), experts * S * S)
    return places.scatter(1, index.expand_as(numbers), numbers).view(len(numbers), experts, S * S)


def add_pyramid(
    y: Float[Tensor, "rows *n o"],
    x: Float[Tensor, "rows *n i"],
    gates: Float[Tensor, "rows *some experts"],
    pyramid: Pyramid,
    once: Once | None = None,
) -> Float[Tensor, "rows *n o"]:
    """`moepeft.methods.ept.add_pyramid`; `once` sorts the features for all sites that read x."""
    ready = pyramid.ready or make_ready([pyramid], [(x.shape[-1], y.shape[-1])])[0]
    kernel = ready.kernel
    if kernel is None:
        assert ready.blocks is not None
        with without_autocast(gates):
            kernel = _square(gates.flatten(0, -2) @ ready.blocks, ready.g)
    leading = gates.dim() - 1
    if ready.g is not None:
        return add_sorted(y, x, kernel, ready, leading, pyramid.input_is_kept, once)
    kind = computing_type(x)
    low = F.linear(x.to(kind), ready.down.to(kind))
    S = kernel.shape[-1]
    mixed = torch.bmm(low.view(len(kernel), low.shape[leading:].numel() // S, S), kernel.to(kind))
    return add_linear(y, mixed.view(low.shape), ready.up)


def _square(kernel: Float[Tensor, "*n S_S"], g: int | None) -> Float[Tensor, "*n S S"]:
    """Flat kernels as the form has them."""
    S = math.isqrt(kernel.shape[-1])
    square = kernel.view(*kernel.shape[:-1], S, S)
    return square.mT if g is None else square
