"""The reported students as one long pandas frame: what every table and figure of the suite is a view of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from benchmarks.mechanisms.experiments import Experiment
from benchmarks.mechanisms.runs import Archive, Run
from benchmarks.mechanisms.suite import reported_runs
from benchmarks.mechanisms.tuning import Choice, choose_rate


class Incomplete(RuntimeError):
    """A run that the experiment needs was not made."""


def read_choices(experiment: Experiment, methods: Sequence[str], archive: Archive) -> dict[str, Choice]:
    """Every method's rate, from the archive alone.

    Raises:
        Incomplete: trials are missing.
    """

    def refuse(runs: Sequence[Run]) -> None:
        missing = archive.missing(runs)
        if missing:
            raise Incomplete(
                f"{experiment.name}: {len(missing)} trials of {missing[0].method} are missing under {archive.root}; "
                "run `python -m benchmarks.run --suite mechanisms` with the same flags again"
            )

    return {name: choose_rate(experiment, name, archive, refuse) for name in experiment.contestants(methods)}


def read_frame(experiment: Experiment, choices: dict[str, Choice], archive: Archive) -> pd.DataFrame:
    """One row per reported run.

    Columns: experiment, method, size (rank of the reference whose size the method has; NaN for its own), the fields of
    the curriculum, seed, rate, at_edge, status, parameters, score (mean R2 over tasks), bound (of a task-blind
    answer), swap_loss (mean R2 that a wrong id costs), seconds, run (id of the line in the archive), machine.

    Raises:
        Incomplete: a reported run is missing.
    """
    rows: list[dict[str, Any]] = []
    for reported in reported_runs(experiment, choices):
        run = reported.run
        outcome = archive.find(run)
        if outcome is None:
            raise Incomplete(
                f"{experiment.name}: the run of {run.method}, seed {run.seed} ({run.id}), is missing under "
                f"{archive.root}; run `python -m benchmarks.run --suite mechanisms` with the same flags again"
            )
        facts = {"status": outcome.status, "parameters": outcome.parameters, "score": outcome.score}
        facts |= {"bound": outcome.bound, "swap_loss": outcome.swap_loss, "seconds": outcome.seconds}
        rows.append(
            {"experiment": experiment.name, "method": run.method, "size": reported.size}
            | asdict(run.curriculum)
            | {"seed": run.seed, "rate": run.rate, "at_edge": choices[run.method].at_edge}
            | facts
            | {"run": run.id, "machine": outcome.machine}
        )
    return pd.DataFrame(rows).astype({"size": "float64", "score": "float64", "swap_loss": "float64"})
