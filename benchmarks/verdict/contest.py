"""Which method is best on one teacher of the mechanisms, and which are as good."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from benchmarks.mechanisms.tables import compare_pairs
from benchmarks.verdict.evidence import Strength

SAME = 0.01
"""Smaller differences of R2 count as none, however certain they are."""


@dataclass(frozen=True)
class Contest:
    """How methods came out on one teacher.

    Attributes:
        best: the method with the highest mean score; None if every method failed on a seed.
        near: methods that are as good or not told apart from the best, among them those whose rate is at an edge.
        below: decided to be worse, by `SAME` or more.
        failed: did not end well on every seed, and are left out.
    """

    best: str | None
    near: tuple[str, ...]
    below: tuple[str, ...]
    failed: tuple[str, ...]

    @property
    def choice(self) -> str:
        """The best, with those that are as good."""
        return f"{self.best} (as good: {', '.join(self.near)})" if self.near else f"{self.best}"

    @property
    def strength(self) -> Strength:
        """Decided if the best is above all others."""
        if self.best is None or not (self.below or not self.near):
            return Strength.UNDECIDED
        return Strength.PARTLY if self.near or self.failed else Strength.DECIDED

    @property
    def words(self) -> str:
        """Whom the best beats, to be put after its score."""
        parts = [f"decided above {', '.join(self.below) or 'no other method'}"]
        parts += [f"as good, or not told apart: {', '.join(self.near)}"] if self.near else []
        parts += [f"failed on a seed: {', '.join(self.failed)}"] if self.failed else []
        return "; ".join(parts)


def find_best(rows: pd.DataFrame) -> Contest:
    """Compare all methods on one teacher, paired by seed.

    A method whose rate lies at an end of its grid may be better than its score says: nothing is decided above it.

    Args:
        rows: of the long frame, of one teacher and of the methods that may win.
    """
    failing = rows.groupby("method", sort=False)["score"].apply(lambda scores: bool(scores.isna().any()))
    failed = tuple(str(name) for name, fails in failing.items() if fails)
    sound = rows[~rows["method"].isin(failed)]
    if sound.empty:
        return Contest(None, (), (), failed)
    names = [str(name) for name in sound.groupby("method")["score"].mean().sort_values(ascending=False).index]
    pairs, edges = compare_pairs(sound), set(sound.loc[sound["at_edge"], "method"])
    is_below = (pairs["better"] == names[0]) & pairs["decided"] & (pairs["difference"] >= SAME)
    below = [name for name in names if name in set(pairs[is_below]["worse"]) - edges]
    return Contest(names[0], tuple(name for name in names[1:] if name not in below), tuple(below), failed)
