"""Index tables of EPT's fast path: where the numbers of seeds and kernels stand in the matrices that multiply.

One gather per matrix takes the place of dozens of copies, scale by scale, at every site of every step. The tables
depend on sizes alone. So they are made once per size and device, and all sites of that size use them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Tables(NamedTuple):
    """Tables of one size, flat.

    Columns of A and rows of B both are r numbers, and are gathered together: first the i_s columns of A, then the o_s
    rows of B, then one row of zeros.

    Attributes:
        seeds: for each of the i // g + o // g rows of the transposed factors, the seed's row in each of M columns.
        from_seeds: for every row of the seeds, the M places that it was copied to.
        blocks: for every entry of the experts' block-diagonal matrices (experts, S, S), the number of the kernels.
        from_blocks: for every number of the kernels, its entry in the block-diagonal matrices.
        zeros: r zeros, what an index behind the last row or number reads.
        factors: the factor of every expert.
    """

    seeds: Int[Tensor, "i_g_and_o_g_times_M"]
    from_seeds: Int[Tensor, "i_s_and_o_s_times_M"]
    blocks: Int[Tensor, "experts_times_S_times_S"]
    from_blocks: Int[Tensor, "numbers"]
    zeros: Float[Tensor, "1 r"]
    factors: Float[Tensor, "experts"]


def make_tables(
    scales: tuple[tuple[int, int], ...],
    factors: tuple[float, ...],
    seed_widths: tuple[int, int],
    widths: tuple[int, int],
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tables:
    """The tables of one size.

    Args:
        scales: number of experts and kernel size of every scale.
        factors: factor of every scale.
        seed_widths: columns of A, rows of B.
        widths: features of the input and of the output.
        rank: rank of the seed.
        dtype: type of the constants.
        device: where the tables are used.
    """
    g = math.gcd(*(size for _, size in scales))
    # The first caller may be in inference mode or under another default device; later callers may train elsewhere.
    with torch.inference_mode(False), torch.device("cpu"):
        seeds = _seed_tables([size // g for _, size in scales], seed_widths, (widths[0] // g, widths[1] // g))
        blocks = _block_tables(scales, g)
        of_experts = [factor for (count, _), factor in zip(scales, factors, strict=True) for _ in range(count)]
        constants = torch.zeros(1, rank, dtype=dtype), torch.tensor(of_experts, dtype=dtype)
        return Tables(*(table.to(device) for table in (*seeds, *blocks, *constants)))


cached_tables = functools.lru_cache(maxsize=256)(make_tables)


def _seed_tables(ms: Sequence[int], seed_widths: tuple[int, int], widths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`seeds` and `from_seeds`: entry (j m + k, column of offset k) of A (x) I_m is column j of A.

    Args:
        ms: m of every scale.
        seed_widths: columns of A, rows of B.
        widths: rows of the two transposed factors.
    """
    M, nowhere = sum(ms), sum(widths) * sum(ms)
    m = torch.tensor([m for m in ms for _ in range(m)])
    offset = torch.tensor([k for m in ms for k in range(m)])
    parts, before = [], 0
    for seed_width, width in zip(seed_widths, widths, strict=True):
        row = torch.arange(seed_width).unsqueeze(1) * m + offset
        parts.append(torch.where(row < width // m * m, (before + row) * M + torch.arange(M), nowhere))
        before += width
    from_seeds = torch.cat(parts)
    seeds = torch.full((nowhere + 1,), len(from_seeds))
    seeds[from_seeds] = torch.arange(len(from_seeds)).unsqueeze(1)
    return seeds[:-1].int(), from_seeds.flatten().int()


def _block_tables(scales: Sequence[tuple[int, int]], g: int) -> tuple[Tensor, Tensor]:
    """`blocks` and `from_blocks`: a kernel is a diagonal block, and both sides are sorted by residue mod g."""
    S = sum(size for _, size in scales)
    squares, start, expert = [], 0, 0
    for count, size in scales:
        feature = torch.arange(size)
        side = feature % g * (S // g) + start // g + feature // g
        experts = torch.arange(expert, expert + count).view(-1, 1, 1)
        squares.append(((experts * S + side.unsqueeze(1)) * S + side).flatten())
        start, expert = start + size, expert + count
    from_blocks = torch.cat(squares)
    blocks = torch.full((expert * S * S,), len(from_blocks))
    blocks[from_blocks] = torch.arange(len(from_blocks))
    return blocks.int(), from_blocks.int()
