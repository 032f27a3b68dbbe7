"""What the trials of a tuned run say: scores by rate, and the best rate."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks.protocols.halving import floored
from benchmarks.records.trials import Trials
from benchmarks.reporting.endpoint import FIRST_METRIC, Endpoint
from benchmarks.reporting.render import Table
from benchmarks.reporting.views import count_runs, name_protocol, select_scores


def find_trials(frame: pd.DataFrame, endpoint: Endpoint = FIRST_METRIC) -> list[Trials]:
    """The trials behind the tuned rates, by label in the order of the rows; none where nothing was tuned."""
    trials = frame[frame["trial"]]
    rates = sorted(float(rate) for rate in trials["learning_rate"].unique())
    labels = [str(label) for label in count_runs(frame).index]
    by_label = {label: trials[trials["label"] == label] for label in labels}
    return [_read(label, own, rates, endpoint) for label, own in by_label.items() if len(own)]


def tuning_tables(frame: pd.DataFrame, endpoint: Endpoint = FIRST_METRIC) -> list[Table]:
    """Scores by rate, with the best rate; no table where nothing was tuned."""
    trials = find_trials(frame, endpoint)
    return [_tabulate(frame, trials, endpoint)] if trials else []


def _read(label: str, rows: pd.DataFrame, rates: Sequence[float], endpoint: Endpoint) -> Trials:
    is_last = rows["steps"] == rows["steps"].max()
    last, first = rows[is_last], rows[~is_last]
    runs = last.drop_duplicates("cell")
    scores = select_scores(rows)
    sizes = scores[scores["primary"]].groupby("cell")["rows"].sum()
    return Trials(
        label,
        _means(last, rates, endpoint),
        {rate: _status(runs[runs["learning_rate"] == rate]["status"]) for rate in rates},
        int(sizes.max()) if len(sizes) else 0,
        _means(first, rates, endpoint) if len(first) else {},
        _counted(last, endpoint),
    )


def _counted(rows: pd.DataFrame, endpoint: Endpoint) -> dict[float, float]:
    """Mean over seeds by rate as the choice counts it (`floored`): a trial that failed is the worst there is."""
    runs = rows.drop_duplicates("cell").set_index("cell")
    ended = endpoint.select(rows[rows["status"] == "ok"]).groupby("cell")["value"].mean()
    scores = ended.reindex(runs.index).map(lambda score: floored(None if pd.isna(score) else score))
    return {float(str(rate)): float(mean) for rate, mean in scores.groupby(runs["learning_rate"]).mean().items()}


def _means(rows: pd.DataFrame, rates: Sequence[float], endpoint: Endpoint) -> dict[float, float | None]:
    """Mean over seeds of the mean over tasks, by rate; None of a rate that was not tried, or failed with a seed."""
    ended = rows[rows["status"] == "ok"]
    tried = rows.drop_duplicates("cell").groupby("learning_rate").size()
    scores = endpoint.select(ended).groupby(["learning_rate", "cell"])["value"].mean()
    means, ends = (getattr(scores.groupby(level="learning_rate"), name)() for name in ("mean", "size"))
    return {rate: float(means[rate]) if rate in means.index and ends[rate] == tried[rate] else None for rate in rates}


def _status(statuses: pd.Series[str]) -> str:
    """How the trials at a rate ended, over seeds."""
    failed = [str(status) for status in statuses if status != "ok"]
    return "missing" if not len(statuses) else failed[0] if failed else "ok"


def _tabulate(frame: pd.DataFrame, trials: Sequence[Trials], endpoint: Endpoint) -> Table:
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
    made = frame[frame["trial"]]
    steps = sorted(int(number) for number in made["steps"].unique())
    seeds = sorted(int(seed) for seed in made["seed"].unique())
    rows = max(method.rows for method in trials)
    what = "first metric" if endpoint == FIRST_METRIC else endpoint.words
    how = (
        f"Trials at every learning rate, {steps[-1]} steps and seed{'s' if len(seeds) > 1 else ''} "
        f"{', '.join(map(str, seeds))} each, scored on {rows:,} rows cut from the training rows of all tasks: mean "
        f"over tasks of the {what}, times 100, an undefined one counted as 0."
    )
    if len(steps) > 1:
        how += (
            f" In brackets: rates that did not go on after {steps[0]} steps. The grid grew until the best rate had a "
            "neighbour on both sides, or as often as the protocol allows."
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
    score, first = trials.scores[rate], trials.first.get(rate)
    if score is not None:
        return f"{100 * score:z.1f}"
    if trials.statuses[rate] != "missing":
        return trials.statuses[rate]
    if first is not None:
        return f"({100 * first:z.1f})"
    return "-" if trials.first else "missing"
