"""What the tables share: views of the long frame of one protocol (`benchmarks.records.frame`)."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from benchmarks.records.comparable import BASELINES, baseline_rank

NOT_AVAILABLE = "n/a"
MEBIBYTE = 2**20


def select_reported(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of reported runs."""
    return frame[~frame["trial"]]


def select_finished(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of reported runs that ended well."""
    return frame[~frame["trial"] & (frame["status"] == "ok")]


def select_scores(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that are scores of tasks: those with test rows behind them."""
    return frame[frame["rows"].notna()]


def find_tasks(frame: pd.DataFrame) -> list[str]:
    """Tasks that any run has scores on, in the order of the protocol."""
    return [str(task) for task in select_scores(frame)["task"].unique()]


def count_runs(frame: pd.DataFrame) -> pd.DataFrame:
    """Reported runs by label, in the order of the tables: baselines first, then the methods by name.

    Returns:
        By label: `method`; `finished`, `total`: numbers of runs; `failure`: statuses of the runs that did not end
        well, as ``oom`` or ``2 diverged, 1 oom``; `seeds`: as ``3``, or ``2 of 3 (1 oom)``.
    """
    runs = select_reported(frame).drop_duplicates("cell")
    lines = {}
    for label, statuses in runs.groupby("label", sort=False)["status"]:
        finished, total = int((statuses == "ok").sum()), len(statuses)
        failure = _name_failures(statuses[statuses != "ok"].tolist(), finished)
        method = runs.loc[runs["label"] == label, "method"].iloc[0]
        seeds = str(total) if finished == total else f"{finished} of {total} ({failure})"
        lines[label] = {"method": method, "finished": finished, "total": total, "failure": failure, "seeds": seeds}
    return pd.DataFrame.from_dict(lines, orient="index")


def _name_failures(statuses: list[str], finished: int) -> str:
    counts = Counter(statuses)
    if len(counts) == 1 and not finished:
        return next(iter(counts))
    return ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))


def is_baseline(method: str) -> bool:
    """Whether a method adapts nothing, so that it is there for comparison only."""
    return baseline_rank(method) < len(BASELINES)


def find_label(runs: pd.DataFrame, method: str) -> str | None:
    """The label that is `method` or, where that is unambiguous, the only label of this method."""
    if method in runs.index:
        return method
    labels = [str(label) for label in runs.index[runs["method"] == method]]
    return labels[0] if len(labels) == 1 else None


def choose_reference(frame: pd.DataFrame, wanted: str | None) -> str | None:
    """`wanted` if it ran; else the first method that ended well, so that whatever was asked for is compared."""
    runs = count_runs(frame)
    if wanted is not None and find_label(runs, wanted) is not None:
        return wanted
    trained = (
        str(label)
        for label in runs.index
        if runs.loc[label, "finished"] and not is_baseline(str(runs.loc[label, "method"]))
    )
    return next(trained, None)


def pivot_costs(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers of whole runs: one row per finished run, indexed by label and seed, a column per metric."""
    rows = select_finished(frame)
    rows = rows[rows["task"].isna() & rows["step"].isna() & rows["metric"].notna()]
    return rows.pivot_table(index=["label", "seed"], columns="metric", values="value", sort=False)


def name_protocol(frame: pd.DataFrame) -> str:
    """The name of the protocol of a frame that holds one."""
    return str(frame["protocol"].iloc[0])


def fill_gaps(lines: list[dict[str, str]]) -> pd.DataFrame:
    """The lines as text; a failed run's line has only a few of the columns."""
    columns = list(dict.fromkeys(column for line in sorted(lines, key=len, reverse=True) for column in line))
    return pd.DataFrame([{column: line.get(column, NOT_AVAILABLE) for column in columns} for line in lines])
