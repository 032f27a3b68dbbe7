"""Ranks of methods over tasks: Friedman's test, and Nemenyi's for all pairs (Demsar 2006, JMLR 7, 1-30)."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from scikit_posthocs import posthoc_nemenyi_friedman
from scipy import stats


@dataclass(frozen=True, slots=True)
class Ranks:
    """What the ranks of a table of scores say.

    Attributes:
        mean: mean rank over tasks by method; 1 is best, ties share.
        p_value: Friedman's, of the hypothesis that all methods rank alike.
        pairs: Nemenyi's p-value of every pair of methods, adjusted for all of them.
    """

    mean: pd.Series[float]
    p_value: float
    pairs: pd.DataFrame


def rank_methods(scores: pd.DataFrame) -> Ranks:
    """Rank the methods (columns) within each task (row); more is better, a missing score ranks last.

    Raises:
        ValueError: fewer than three methods or two tasks.
    """
    if scores.shape[1] < 3 or scores.shape[0] < 2:
        raise ValueError(
            f"got scores of {scores.shape[1]} methods on {scores.shape[0]} tasks; "
            "ranks need at least 3 methods and 2 tasks"
        )
    # Means of equal scores may differ in their last digit: such methods are tied.
    ranks = scores.round(9).rank(axis=1, ascending=False, na_option="bottom")
    # All tied everywhere: SciPy would divide zero by zero.
    is_tied = bool(ranks.nunique(axis=1).eq(1).all())
    p_value = 1.0 if is_tied else float(stats.friedmanchisquare(*ranks.to_numpy().T).pvalue)
    return Ranks(ranks.mean(), p_value, posthoc_nemenyi_friedman(ranks))
