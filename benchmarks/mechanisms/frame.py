"""The reported students as one long pandas frame: what every table and figure of the suite is a view of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
from scipy.stats import spearmanr

from benchmarks.mechanisms.experiments import Experiment
from benchmarks.mechanisms.runs import Archive, Outcome, Run
from benchmarks.mechanisms.suite import reported_runs
from benchmarks.mechanisms.teachers import true_sizes
from benchmarks.mechanisms.tuning import choose_rate
from benchmarks.protocols.halving import Choice
from benchmarks.records.store import RecordError
from moepeft.config import expert_sizes
from moepeft.registry import from_config


class Incomplete(RecordError):
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
    the curriculum, seed, rate, at_edge, status, parameters, seconds, run (id of the line in the archive), machine, and

    * score: mean R2 over tasks at the end;
    * bound: the highest mean R2 of a task-blind answer;
    * swap_loss: mean R2 that a wrong id costs;
    * forgotten: mean R2 that the tasks taught first lost;
    * largest_share: of one expert in all gates;
    * follows_size: Spearman's correlation over tasks of the teacher's size with the mean size of the chosen experts.

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
        facts |= {"forgotten": outcome.forgotten, "largest_share": outcome.largest_share}
        facts |= {"follows_size": follows_size(outcome)}
        rows.append(
            {"experiment": experiment.name, "method": run.method, "size": reported.size}
            | asdict(run.curriculum)
            | {"seed": run.seed, "rate": run.rate, "at_edge": choices[run.method].at_edge}
            | facts
            | {"run": run.id, "machine": outcome.machine}
        )
    numbers = ("size", "score", "swap_loss", "forgotten", "largest_share", "follows_size")
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, "float64"))


def follows_size(outcome: Outcome) -> float | None:
    """Whether larger scales or ranks of the teacher are met by larger experts of the student."""
    run = outcome.run
    truth, used = true_sizes(run.curriculum), outcome.usage.get(run.lesson.steps)
    sizes = expert_sizes(from_config(run.method.partition("@")[0], run.config))
    if truth is None or not used or sizes is None:
        return None
    chosen = [sum(gate * size for gate, size in zip(row, sizes, strict=True)) / max(sum(row), 1e-9) for row in used]
    constant = max(chosen) - min(chosen) < 1e-9
    return 0.0 if constant else float(spearmanr(truth, chosen).statistic)
