"""Index tables of EPT's fast path: where the numbers of seeds and kernels stand in the matrices that multiply.

One gather takes the place of dozens of copies, scale by scale, and so it does backward. The tables depend on sizes
alone. So they are made once per size and device.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Int
from torch import Tensor

Scales = tuple[tuple[int, int], ...]
"""Number of experts and kernel size of every scale, ascending."""


@functools.lru_cache(maxsize=256)
def seed_tables(
    scales: Scales, seed_widths: tuple[int, int], widths: tuple[int, int], g: int, device: torch.device
) -> tuple[Int[Tensor, "rows_and_one_times_M"], Int[Tensor, "seeds_and_one_times_M"]]:
    """How a site's seed becomes its two factors A (x) I_m and B (x) I_m, m = s / g of every scale.

    Columns of A and rows of B both are r numbers, and are gathered together: first the i_s columns of A, then the o_s
    rows of B, then a row of zeros. The factors end in a row of zeros as well. M is the sum of the m.

    Args:
        scales: of the experts.
        seed_widths: columns of A, rows of B.
        widths: features of the input and of the output.
        g: divides all kernel sizes.
        device: where the tables are used.

    Returns:
        For each of the i // g + o // g + 1 rows of the transposed factors the seed's row in M columns; and for every
        row of the seeds the M places that it was copied to.
    """
    # The first caller may be in inference mode or under another default device; later callers may train elsewhere.
    with torch.inference_mode(False), torch.device("cpu"):
        ms = [size // g for _, size in scales]
        M, nowhere = sum(ms), sum(width // g for width in widths) * sum(ms)
        m = torch.tensor([m for m in ms for _ in range(m)])
        offset = torch.tensor([k for m in ms for k in range(m)])
        parts, before = [], 0
        for seed_width, width in zip(seed_widths, (width // g for width in widths), strict=True):
            # Entry (j m + k, column of offset k) of A (x) I_m is column j of A.
            row = torch.arange(seed_width).unsqueeze(1) * m + offset
            parts.append(torch.where(row < width // m * m, (before + row) * M + torch.arange(M), nowhere))
            before += width
        places = torch.cat(parts)
        seeds = torch.full((nowhere + M,), len(places))  # where nothing is said, the row of zeros
        seeds[places] = torch.arange(len(places)).unsqueeze(1)
        seeds[nowhere:] = len(places)
        places = torch.cat((places.flatten(), torch.full((M,), nowhere)))
        return seeds.int().to(device), places.int().to(device)


@functools.lru_cache(maxsize=256)
def block_table(scales: Scales, g: int, device: torch.device) -> Int[Tensor, "numbers"]:
    """For every number of the kernels, its place in the block-diagonal matrices (experts, S, S).

    A kernel is a diagonal block. Both sides are sorted by residue mod g.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        S = sum(size for _, size in scales)
        squares, start, expert = [], 0, 0
        for count, size in scales:
            feature = torch.arange(size)
            side = feature % g * (S // g) + start // g + feature // g
            numbers = torch.arange(expert, expert + count).view(-1, 1, 1)
            squares.append(((numbers * S + side.unsqueeze(1)) * S + side).flatten())
            start, expert = start + size, expert + count
        return torch.cat(squares).to(device)
