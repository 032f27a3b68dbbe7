"""What EPT's equations and its release share: experts of several scales that have one seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Once = Callable[[str, Tensor, Callable[[], Tensor]], Tensor]
"""`SiteContext.of_input`: makes what depends on an input alone once for all sites that read the input."""


class Part(NamedTuple):
    """Some of the scales: their columns of the factors, their numbers in a flat kernel (S S); None for all."""

    columns: Int[Tensor, "_"] | None = None
    numbers: Int[Tensor, "_"] | None = None


class Run(NamedTuple):
    """Rows of one task that stand beside each other, and the scales that they use."""

    rows: slice
    part: Part


Runs = tuple[Run, ...]
"""The runs of a site, in the order of the rows."""


class Ready(NamedTuple):
    """What the fast path has made of a pyramid before an input is known, as the form has it that the site takes.

    Attributes:
        down: the seed's factor A, spread over all scales.
        up: the seed's factor B.
        blocks: the experts' kernels with f_e, as block-diagonal matrices; None where `kernel` is there.
        kernel: the gated kernels of every row.
        runs: which rows use which scales.
        g: what the sorted form sorts the features by; None for the plain form.
    """

    down: Float[Tensor, "_ _"]
    up: Float[Tensor, "_ _"]
    blocks: Float[Tensor, "experts S_S"] | None
    kernel: Float[Tensor, "rows S S"] | None
    runs: Runs
    g: int | None


class Pyramid(NamedTuple):
    """What a site's experts are made of: the seed, and per scale, ascending, its kernels and f_e.

    f_e is alpha / r times the dimension factor. `ready` is what the fast path has made of them. `input_is_kept`: the
    layer before keeps the site's input for its own backward.
    """

    A: Float[Tensor, "r i_s"]
    B: Float[Tensor, "o_s r"]
    kernels: Sequence[Float[Tensor, "_ _ _"]]
    factors: Sequence[float]
    ready: Ready | None = None
    input_is_kept: bool = False


class Definition(NamedTuple):
    """What an expert is.

    Attributes:
        kernel_shape: shape of a kernel, from its size s and the width of the output.
        add_update: y plus the gated experts' updates, with the arguments of `add_pyramid`.
        make_ready: makes `Pyramid.ready` for all sites at once; None where `add_update` reads no such thing.
    """

    kernel_shape: Callable[[int, int], tuple[int, int]]
    add_update: Callable[..., Tensor]
    make_ready: Callable[..., list[Ready]] | None = None


def add_experts(
    expert: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor],
    y: Float[Tensor, "rows *n o"],
    x: Float[Tensor, "rows *n i"],
    gates: Float[Tensor, "rows *some experts"],
    pyramid: Pyramid,
) -> Float[Tensor, "rows *n o"]:
    """y plus the sum over experts of g_e f_e W_e x, scale by scale; gates are per row, or per token.

    The experts of a scale share their seed, and `expert`, W_e x, is linear in the kernel: kernels add up first.
    """
    gates = gates.view(gates.shape[0], *(1,) * (x.dim() - gates.dim()), *gates.shape[1:])
    A, B = pyramid.A.to(x.dtype), pyramid.B.to(x.dtype)
    of_scales = torch.split(gates, [len(K) for K in pyramid.kernels], dim=-1)
    for g, K, f in zip(of_scales, pyramid.kernels, pyramid.factors, strict=True):
        gated = torch.einsum("...e,est->...st", f * g, K).to(x.dtype)
        y = y + expert(x, A, B, gated, y.shape[-1]).to(y.dtype)
    return y
