"""What the trials of a tuned run say: scores by rate, and the best rate."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks.records.trials import Trials
from benchmarks.reporting.render import Table
from benchmarks.reporting.views import count_runs, name_protocol, select_scores


def find_trials(frame: pd.DataFrame) -> list[Trials]:
    """The trials behind the tuned rates, by label in the order of the rows; none where nothing was tuned."""
    trials = frame[frame["trial"]]
    rates = sorted(float(rate) for rate in trials["learning_rate"].unique())
    labels = [str(label) for label in count_runs(frame).index]
    return [_read(label, trials[trials["label"] == label], rates) for label in labels if label in set(trials["label"])]


def tuning_tables(frame: pd.DataFrame) -> list[Table]:
    """Scores by rate, with the best rate; no table where nothing was tuned."""
    trials = find_trials(frame)
    return [_tabulate(frame, trials)] if trials else []


def _read(label: str, rows: pd.DataFrame, rates: Sequence[float]) -> Trials:
    runs = rows.drop_duplicates("cell").set_index("learning_rate")["status"]
    scores = select_scores(rows)
    primary = scores[scores["primary"] & (scores["status"] == "ok")]
    means = primary.groupby("learning_rate")["value"].mean()
    sizes = scores[scores["primary"]].groupby("cell")["rows"].sum()
    return Trials(
        label,
        {rate: float(means[rate]) if rate in means.index else None for rate in rates},
        {rate: str(runs[rate]) if rate in runs.index else "missing" for rate in rates},
        int(sizes.max()) if len(sizes) else 0,
    )


def _tabulate(frame: pd.DataFrame, trials: Sequence[Trials]) -> Table:
    lines = [
        {"method": method.method}
        | {f"{rate:g}": _format(method, rate) for rate in method.scores}
        | {"best rate": f"{method.best:g}" + (f" ({method.at_edge} tried)" if method.at_edge else "")}
        for method in trials
    ]
    facts = [
        {
            "method": method.method,
            "rate": rate,
            "score": score,
            "status": method.statuses[rate],
            "best": rate == method.best,
            "edge": rate == method.best and method.at_edge is not None,
        }
        for method in trials
        for rate, score in method.scores.items()
    ]
    first = frame[frame["trial"]].iloc[0]
    rows = max(method.rows for method in trials)
    how = (
        f"Trials at every learning rate, {first['steps']} steps and seed {first['seed']} each, scored on {rows:,} rows "
        "cut from the training rows of all tasks: mean over tasks of the first metric, times 100, an undefined one "
        "counted as 0."
    )
    notes = [how]
    edges = [method.method for method in trials if method.at_edge]
    if edges:
        notes.append(
            f"Best at the lowest or highest rate tried, so that a better one may lie beyond: {', '.join(edges)}."
        )
    title = f"Tuning of the learning rate ({name_protocol(frame)})"
    return Table("tuning", title, pd.DataFrame(lines), pd.DataFrame(facts), tuple(notes))


def _format(trials: Trials, rate: float) -> str:
    score = trials.scores[rate]
    return trials.statuses[rate] if score is None else f"{100 * score:z.1f}"
