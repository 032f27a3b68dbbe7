"""Deterministic draws, and the collection of balanced, distinct rows."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from benchmarks.tasks.base import Example
from benchmarks.tasks.quick.lexicon import Vocabulary

T = TypeVar("T")
ATTEMPTS = 2000


class Draw:
    """Random choices that are the same on every machine and Python.

    Only `random.Random.random` is used: the one method whose sequence Python promises to keep across versions.
    """

    def __init__(self, key: str) -> None:
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        self._random = random.Random(seed)  # noqa: S311 - reproducibility is wanted, not secrecy

    def below(self, limit: int) -> int:
        """An integer in ``[0, limit)``."""
        return int(self._random.random() * limit)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self._random.random() < probability

    def one(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order."""
        if count > len(items):
            raise ValueError(f"got {count} to draw out of {len(items)} items; add items to the lexicon")
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]

    def other(self, items: Sequence[T], *unwanted: T) -> T:
        """One of the items that is none of the unwanted ones."""
        return self.one([item for item in items if item not in unwanted])


Maker = Callable[[Draw, Vocabulary, int], Example]


def collect(make: Maker, vocabulary: Vocabulary, *, key: str, rows: int, targets: int) -> list[Example]:
    """Distinct rows of a task, every block of `targets` rows holding each target once.

    Args:
        make: builds a row for a target (a class, a grade of similarity or a place of the right answer).
        vocabulary: the half of the lexicon to draw from.
        key: what the random stream depends on; more rows of the same key extend the list.
        rows: how many.
        targets: number of targets.
    """
    draw = Draw(key)
    seen: set[tuple[str, str | None, frozenset[str]]] = set()
    found: list[Example] = []
    while len(found) < rows:
        block = draw.some(range(targets), targets)
        found.extend(_new_row(make, vocabulary, draw, target, seen) for target in block)
    return found[:rows]


def _new_row(
    make: Maker,
    vocabulary: Vocabulary,
    draw: Draw,
    target: int,
    seen: set[tuple[str, str | None, frozenset[str]]],
) -> Example:
    for _ in range(ATTEMPTS):
        example = make(draw, vocabulary, target)
        identity = (example.first, example.second, frozenset(example.choices))
        if identity not in seen:
            seen.add(identity)
            return example
    raise ValueError(
        f"got no new row for target {target} in {ATTEMPTS} attempts after {len(seen)} rows, wanted another; "
        "ask for fewer rows or add words to the lexicon"
    )
