"""Which scales a task uses, where the host knows: EPT multiplies a task's rows by no other.

As published a task uses two experts of eight, so one or two scales of four: 46 % of the rank space on the average. The
gates say which. A CPU reads them. Rows of one task that stand beside each other are one product, a run. To sort the
rows by task in here was tried: with two threads the copies took longer than the products that were left out. Whoever
makes the batch sorts its rows for nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moepeft.fast import is_recorded
from moepeft.methods._fast.ept_tables import Scales
from moepeft.methods._pyramid import Part, Run, Runs

WHOLE: Runs = (Run(slice(None), Part()),)
"""All rows with all scales."""
PAYS = 1 << 16
"""Features of a run's inputs and outputs from which what is left out takes longer than what a run costs."""
WORTH = 0.8
"""Where more than this share of the rank space is used, nothing is left out."""


def find_runs(
    gates: Float[Tensor, "sites rows experts"], tasks: Int[Tensor, "rows"], scales: Scales, rank: int
) -> list[Runs]:
    """Of every site the runs of the rows of these tasks; `WHOLE` where the host does not know or nothing is gained.

    Args:
        gates: of every site.
        tasks: of the rows; one alone stands for all rows of the call.
        scales: of the experts.
        rank: of the seed.
    """
    if tasks.device.type != "cpu" or gates.device.type != "cpu" or is_recorded():
        return [WHOLE] * len(gates)
    stops = list(accumulate(len(list(same)) for _, same in groupby(tasks.tolist())))
    starts = [0, *stops[:-1]]
    chosen = gates.detach()[:, starts] != 0
    return [_of_site(used, starts, stops, scales, rank) for used in _by_scale(chosen, scales).tolist()]


def _by_scale(chosen: Bool[Tensor, "sites runs experts"], scales: Scales) -> Bool[Tensor, "sites runs scales"]:
    experts = torch.split(chosen, [count for count, _ in scales], dim=-1)
    return torch.stack([of_scale.any(dim=-1) for of_scale in experts], dim=-1)


def _of_site(used: list[list[bool]], starts: Sequence[int], stops: Sequence[int], scales: Scales, rank: int) -> Runs:
    sizes = [size for _, size in scales]
    computed = sum(
        (stop - start) * sum(size for size, one in zip(sizes, own, strict=True) if one)
        for own, start, stop in zip(used, starts, stops, strict=True)
    )
    if computed > WORTH * sum(sizes) * stops[-1]:
        return WHOLE
    runs = tuple(_merged(used, starts, stops, scales, rank))
    return (Run(slice(None), runs[0].part),) if len(runs) == 1 else runs


def _merged(
    used: list[list[bool]], starts: Sequence[int], stops: Sequence[int], scales: Scales, rank: int
) -> Iterator[Run]:
    """Tasks beside each other that use the same scales are one run."""
    for own, tasks in groupby(range(len(used)), key=lambda task: tuple(used[task])):
        numbers = list(tasks)
        yield Run(slice(starts[numbers[0]], stops[numbers[-1]]), _part(scales, rank, own))


@functools.lru_cache(maxsize=256)
def _part(scales: Scales, rank: int, used: tuple[bool, ...]) -> Part:
    # The first caller may be in inference mode or under another default device.
    with torch.inference_mode(False), torch.device("cpu"):
        g = math.gcd(*(size for _, size in scales))
        ms = [size // g for _, size in scales]
        taken = torch.repeat_interleave(torch.tensor(used), torch.tensor(ms)).nonzero().flatten()
        M = sum(ms)
        columns = (taken.unsqueeze(1) * rank + torch.arange(rank)).flatten()
        sides = (torch.arange(g).unsqueeze(1) * M + taken).flatten()
        return Part(columns, (sides.unsqueeze(1) * (g * M) + sides).flatten())


def paying(runs: Runs, features: int) -> Runs:
    """The runs of a site, where they save more than they cost; `features` are those of its input and its output."""
    return WHOLE if features < PAYS * len(runs) else runs
