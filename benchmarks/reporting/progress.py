"""The table of progress: the endpoint at every checkpoint, and how long each method takes to a quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from benchmarks.reporting.endpoint import Endpoint
from benchmarks.reporting.render import Table
from benchmarks.reporting.views import NOT_AVAILABLE, count_runs, find_label, name_protocol, select_finished
from benchmarks.statistics.intervals import mean_interval


def progress_tables(frame: pd.DataFrame, reference: str | None, endpoint: Endpoint) -> list[Table]:
    """The endpoint by step, seconds, and the way to the reference's quality; none where no run was scored on its way.

    Args:
        frame: the long frame of one protocol.
        reference: the method whose quality at the last checkpoint but one is to be reached.
        endpoint: what is scored.
    """
    scores, seconds = _by_step(frame, endpoint)
    if scores.empty:
        return []
    steps = [int(step) for step in scores.columns]
    runs = count_runs(frame)
    base = None if reference is None else find_label(runs, reference)
    means = {
        str(label): {step: float(own[step].mean()) for step in steps} for label, own in scores.groupby(level="label")
    }
    quality = means[base][steps[-2]] if base is not None and base in means and len(steps) > 1 else None
    lines, facts = [], []
    for label in (str(label) for label in runs.index if str(label) in means):
        own, clock = scores.loc[[label]], seconds.loc[[label]].mean()
        cells = {f"{step:,}": _cell(own[step]) for step in steps}
        line = {"method": label, **cells, "seconds": f"{clock[steps[-1]]:,.0f}"}
        reached = None if quality is None else steps_to(means[label], quality)
        if quality is not None:
            line["steps to quality"] = NOT_AVAILABLE if reached is None else f"{reached:,.0f}"
            line["seconds to quality"] = (
                NOT_AVAILABLE if reached is None else f"{np.interp(reached, [0, *steps], [0, *clock[steps]]):,.0f}"
            )
        lines.append(line)
        for step in steps:
            mean, half = mean_interval(own[step])
            facts.append(
                {"method": label, "step": step, "mean": mean, "half_width": half, "seconds": clock[step],
                 "steps_to_quality": reached}
            )  # fmt: skip
    notes = (_note(endpoint, base, quality, steps),)
    return [Table("progress", f"Progress ({name_protocol(frame)})", pd.DataFrame(lines), pd.DataFrame(facts), notes)]


def steps_to(scores: Mapping[int, float], quality: float) -> float | None:
    """Steps after which a score first is `quality`, between checkpoints by a straight line; None where it never is."""
    steps = sorted(scores)
    if scores[steps[0]] >= quality:
        return float(steps[0])
    for before, after in pairwise(steps):
        if scores[after] >= quality:
            share = (quality - scores[before]) / (scores[after] - scores[before])
            return before + share * (after - before)
    return None


def _by_step(frame: pd.DataFrame, endpoint: Endpoint) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean of the endpoint, and seconds of training, by label and run (rows) and step (columns)."""
    finished = select_finished(frame)
    rows = finished[finished["metric"] == f"checkpoint.{endpoint.metric}"]
    if endpoint.tasks:
        rows = rows[rows["task"].isin(endpoint.tasks)]
    clock = finished[finished["metric"] == "checkpoint.seconds"]
    keys = ["label", "cell"]
    scores, seconds = (
        part.pivot_table(index=keys, columns="step", values="value", aggfunc="mean", sort=True)
        for part in (rows, clock)
    )
    return scores.dropna(), seconds


def _cell(values: pd.Series[float]) -> str:
    mean, half = mean_interval(values)
    return f"{100 * mean:z.1f}" + ("" if np.isnan(half) else f" ± {100 * half:.1f}")


def _note(endpoint: Endpoint, base: str | None, quality: float | None, steps: Sequence[int]) -> str:
    text = (
        f"Mean {endpoint.words}, times 100, after so many steps, always on the same rows; the rate is constant and "
        "averaged weights are scored, so that every column is the end of a run of that length, but for the order of "
        "the last rows where the length is no multiple of `length_window` steps. Seconds: of training alone, where "
        "other cells ran beside as they did."
    )
    if quality is not None:
        text += (
            f" Quality: what {base} has after {steps[-2]:,} steps, {100 * quality:.1f}; on a straight line between "
            "checkpoints; n/a: not reached."
        )
    return text
