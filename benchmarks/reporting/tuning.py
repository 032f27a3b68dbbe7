"""What the trials of a tuned run say: scores by rate, and the best rate."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks.records.schema import RunRecord, Tuning
from benchmarks.records.store import Store
from benchmarks.records.trials import Trials, belongs, read_trials, trial_store
from benchmarks.reporting.comparable import Group
from benchmarks.reporting.render import Table


def group_trials(group: Group, store: Store) -> list[Trials]:
    """The trials behind the tuned rates of a group, by method in the order of its rows; none where nothing was tuned.

    Args:
        group: of reported runs.
        store: of the reported runs; the trials are in a folder of it.
    """
    if group.tuned is None:
        return []
    found: dict[str, dict[float, RunRecord]] = {}
    for record in trial_store(store.root).all():
        if belongs(record.cell, group.rows[0].records[0].cell):
            found.setdefault(_key(record), {})[record.cell.protocol.learning_rate] = record
    rows = {_key(row.records[0]): row.label for row in group.rows}
    return [
        read_trials(label, {rate: found[key].get(rate) for rate in group.tuned.rates})
        for key, label in rows.items()
        if key in found
    ]


def _key(record: RunRecord) -> str:
    return f"{record.cell.method} {sorted(record.cell.config.items())}"


# ---------------------------------------------------------------------- tables


def tuning_tables(group: Group, store: Store) -> list[Table]:
    """The trials of a group: scores by rate, with the best rate; no table where nothing was tuned."""
    trials = group_trials(group, store)
    return [_scores(group, trials, group.tuned)] if trials and group.tuned is not None else []


def _scores(group: Group, trials: Sequence[Trials], tuned: Tuning) -> Table:
    lines = [
        {"method": one.method}
        | {f"{rate:g}": _cell(one, rate) for rate in one.scores}
        | {"best rate": f"{one.best:g}" + (f" ({one.at_edge} tried)" if one.at_edge else "")}
        for one in trials
    ]
    facts = [
        {
            "method": one.method,
            "rate": rate,
            "score": score,
            "status": one.statuses[rate],
            "best": rate == one.best,
            "edge": rate == one.best and one.at_edge is not None,
        }
        for one in trials
        for rate, score in one.scores.items()
    ]
    rows = max(one.rows for one in trials)
    how = (
        f"Trials at every learning rate, {tuned.steps} steps and seed {tuned.seed} each, scored on {rows:,} rows "
        "cut from the training rows of all tasks: mean over tasks of the first metric, times 100, an undefined one "
        "counted as 0."
    )
    notes = [how]
    edges = [one.method for one in trials if one.at_edge]
    if edges:
        notes.append(
            f"Best at the lowest or highest rate tried, so that a better one may lie beyond: {', '.join(edges)}."
        )
    return Table(
        "tuning", f"Tuning of the learning rate ({group.label})", pd.DataFrame(lines), pd.DataFrame(facts), tuple(notes)
    )


def _cell(trials: Trials, rate: float) -> str:
    score = trials.scores[rate]
    return trials.statuses[rate] if score is None else f"{100 * score:z.1f}"
