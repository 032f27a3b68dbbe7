"""Index tables of EPT's fast path: where the numbers of seeds and kernels stand in the matrices that multiply.

One gather takes the place of dozens of copies, scale by scale, and so it does backward. The tables depend on sizes
alone. So they are made once per size, number of sites and device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Tables(NamedTuple):
    """Tables of sites of one size, flat.

    Columns of A and rows of B both are r numbers, and are gathered together. Of every site first the i_s columns of A,
    then the o_s rows of B, then a row of zeros. A site's factors end in a row of zeros as well.

    Attributes:
        seeds: for each of the i // g + o // g + 1 rows of a site's transposed factors, the seed's row in M columns.
        from_seeds: for every row of the seeds, the M places that it was copied to.
        blocks: for every number of the kernels, its place in the block-diagonal matrices (experts, S, S).
    """

    seeds: Int[Tensor, "sites_times_rows_times_M"]
    from_seeds: Int[Tensor, "sites_times_seeds_times_M"]
    blocks: Int[Tensor, "numbers"]


@functools.lru_cache(maxsize=256)
def cached_tables(
    scales: tuple[tuple[int, int], ...],
    seed_widths: tuple[int, int],
    widths: tuple[int, int],
    sites: int,
    device: torch.device,
) -> Tables:
    """The tables of one size.

    Args:
        scales: number of experts and kernel size of every scale.
        seed_widths: columns of A, rows of B.
        widths: features of the input and of the output.
        sites: how many.
        device: where the tables are used.
    """
    g = math.gcd(*(size for _, size in scales))
    # The first caller may be in inference mode or under another default device; later callers may train elsewhere.
    with torch.inference_mode(False), torch.device("cpu"):
        ms = [size // g for _, size in scales]
        seeds, from_seeds = _seed_tables(ms, seed_widths, (widths[0] // g, widths[1] // g))
        number = torch.arange(sites).unsqueeze(1)
        of_sites = (seeds + number * (sum(seed_widths) + 1), from_seeds + number * len(seeds))
        flat = (table.flatten().int() for table in of_sites)
        return Tables(*(table.to(device) for table in (*flat, _block_table(scales, g))))


def _seed_tables(ms: Sequence[int], seed_widths: tuple[int, int], widths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`seeds` and `from_seeds` of a site: entry (j m + k, column of offset k) of A (x) I_m is column j of A.

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
    places = torch.cat(parts)
    seeds = torch.full((nowhere + M,), len(places))  # where nothing is said, the row of zeros
    seeds[places] = torch.arange(len(places)).unsqueeze(1)
    seeds[nowhere:] = len(places)
    return seeds, torch.cat((places.flatten(), torch.full((M,), nowhere)))


def _block_table(scales: Sequence[tuple[int, int]], g: int) -> Tensor:
    """A kernel is a diagonal block, and both sides are sorted by residue mod g."""
    S = sum(size for _, size in scales)
    squares, start, expert = [], 0, 0
    for count, size in scales:
        feature = torch.arange(size)
        side = feature % g * (S // g) + start // g + feature // g
        experts = torch.arange(expert, expert + count).view(-1, 1, 1)
        squares.append(((experts * S + side.unsqueeze(1)) * S + side).flatten())
        start, expert = start + size, expert + count
    return torch.cat(squares)
