"""The table of ranks: how the methods order over tasks, and which pairs the tasks tell apart."""

from __future__ import annotations

import pandas as pd

from benchmarks.reporting.render import Table
from benchmarks.reporting.scores import rank_rows
from benchmarks.reporting.views import is_baseline, name_protocol
from benchmarks.statistics.intervals import CONFIDENCE
from benchmarks.statistics.ranks import rank_methods

MINIMUM_TASKS = 5
MINIMUM_METHODS = 3


def pivot_scores(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean primary scores (tasks, methods) without baselines; NaN where one is undefined."""
    rows = [row for row in rank_rows(frame) if not is_baseline(row.method)]
    by_label = {row.label: {task: averages[0].mean for task, averages in row.tasks.items()} for row in rows}
    return pd.DataFrame(by_label, dtype=float).dropna(how="all").round(9)


def can_rank(scores: pd.DataFrame) -> bool:
    """Whether there are methods (columns) and tasks (rows) enough for the test to say anything."""
    return bool(scores.shape[1] >= MINIMUM_METHODS and scores.shape[0] >= MINIMUM_TASKS)


def ranks_tables(frame: pd.DataFrame) -> list[Table]:
    """Mean rank over tasks, best first, with the methods that Nemenyi's test puts below; none of too few tasks."""
    scores = pivot_scores(frame)
    if not can_rank(scores):
        return []
    ranks = rank_methods(scores)
    mean: dict[str, float] = {str(method): rank for method, rank in ranks.mean.sort_values(kind="stable").items()}
    best = {str(method): int(number) for method, number in scores.eq(scores.max(axis=1), axis=0).sum().items()}
    p_values = {(method, other): float(ranks.pairs[method][other]) for method in mean for other in mean}
    lines, facts = [], []
    for method, rank in mean.items():
        others = [other for other in mean if other != method]
        below = [other for other in others if mean[other] > rank and p_values[method, other] < 1 - CONFIDENCE]
        lines.append(
            {
                "method": method,
                "mean rank": f"{rank:.2f}",
                "best on": f"{best[method]} of {len(scores)}",
                "ranks above": ", ".join(below) or "none for certain",
            }
        )
        facts += [
            {"method": method, "mean_rank": rank, "best_on": best[method], "tasks": len(scores), "other": other,
             "p_nemenyi": p_values[method, other], "p_friedman": ranks.p_value}
            for other in others
        ]  # fmt: skip
    note = (
        f"Ranks of the mean primary score within each task, 1 is best, ties share. Friedman's test of no difference: "
        f"p = {ranks.p_value:.2g}. Ranks above: pairs that Nemenyi's test at 5 % tells apart, adjusted for all pairs. "
        "Tasks are the replicates here: the test says how methods order over tasks like these, not by how much."
    )
    title = f"Ranks over tasks ({name_protocol(frame)})"
    return [Table("ranks", title, pd.DataFrame(lines), pd.DataFrame(facts), (note,))]
