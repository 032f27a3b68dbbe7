"""Which rows every training step sees: decided by the protocol and the seed alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter

import numpy as np

from benchmarks.protocols.seeds import generator


def training_order(
    sizes: dict[str, int], *, steps: int, batch_size: int, stream: Sequence[str | int], mixed: bool = True
) -> Iterator[list[tuple[int, int]]]:
    """Which rows every step sees, as (task, row) positions.

    Every slot of every batch draws its task with probability 1/T and takes the next row of that task's own
    shuffled stream, which is reshuffled each time it is used up. Unmixed batches draw one task for all their slots.

    Args:
        sizes: training rows by task name, in the order of the protocol.
        steps: number of batches.
        batch_size: rows per batch.
        stream: names of the random stream; the order depends on nothing else.
        mixed: whether a batch holds rows of several tasks.
    """
    draws = generator(*stream, "tasks")
    rows = [_shuffled_for_ever(size, generator(*stream, "rows", name)) for name, size in sizes.items()]
    for _ in range(steps):
        tasks = draws.integers(len(rows), size=batch_size) if mixed else [draws.integers(len(rows))] * batch_size
        yield [(int(task), next(rows[task])) for task in tasks]


def sorted_within_windows(
    order: Iterable[list[tuple[int, int]]],
    length: Callable[[tuple[int, int]], int],
    *,
    window: int,
    stream: Sequence[str | int],
) -> Iterator[list[tuple[int, int]]]:
    """The same rows, those of `window` consecutive steps sorted by length and cut into steps again, in random order.

    A batch is padded to its longest row: of an unsorted mixed batch two thirds can be padding. In a step the rows of
    a task stand beside each other: EPT multiplies them together.

    Args:
        order: steps of (task, row) positions.
        length: of a row, in tokens.
        window: number of steps sorted together.
        stream: names of the random stream that orders the steps of a window.
    """
    rng = generator(*stream, "windows")
    steps = iter(order)
    while group := list(itertools.islice(steps, window)):
        rows = sorted((row for step in group for row in step), key=length)
        ends = list(itertools.accumulate(map(len, group), initial=0))
        for at in rng.permutation(len(group)):
            yield sorted(rows[ends[at] : ends[at + 1]], key=itemgetter(0))


def _shuffled_for_ever(size: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from map(int, rng.permutation(size))
