"""What the results page shows, as plain data: views of the long frames, and where every number comes from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from benchmarks.records.frame import Results
from benchmarks.records.schema import RunRecord
from benchmarks.reporting.comparison import compare_all_pairs
from benchmarks.reporting.endpoint import Endpoint
from benchmarks.reporting.views import (
    find_tasks,
    is_baseline,
    pivot_costs,
    select_finished,
    select_reported,
    select_scores,
)

CURVE_POINTS = 60


def gather_suites(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """One entry for every protocol of every results folder, the longest runs first.

    Raises:
        RecordError: a record is damaged.
    """
    suites: list[dict[str, Any]] = []
    for folder in folders:
        results = Results.load(folder)
        frame = results.frame()
        for group in results.groups():
            own, endpoint = frame[frame["protocol_id"] == group.key], Endpoint.of(group.protocol, results)
            suites.append(
                {
                    "key": f"{folder.name}/{group.key}",
                    "name": group.label,
                    "folder": folder.as_posix(),
                    "tasks": find_tasks(select_reported(own)),
                    "steps": int(own["steps"].iloc[0]),
                    "reference": group.protocol.reference,
                    "rows": describe_rows(own),
                    "curves": average_curves(own),
                    "endpoint": endpoint.words,
                    "pairs": compare_pairs(own, results.outcomes(group.key), endpoint),
                    "routing": [one for record in group.records if (one := average_routing(record))],
                }
            )
    return sorted(suites, key=lambda suite: -int(suite["steps"]))


def gather_records(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Where every reported number comes from: by cell, the record's file, command, machine and code."""
    found = {}
    for folder in folders:
        for record in Results.load(folder).records:
            made = record.provenance
            found[record.cell.id] = {
                "folder": folder.as_posix(),
                "method": record.cell.method,
                "seed": record.cell.seed,
                "status": record.status,
                "command": made.command,
                "machine": f"{made.device}, {made.threads} threads, {made.precision}",
                "commit": made.commit,
                "started": made.started_utc,
                "packages": ", ".join(f"{name} {version}" for name, version in made.packages.items()),
            }
    return found


# ---------------------------------------------------------------------- rows of the leaderboard


def describe_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per method: scores by task and seed, parameters and step time."""
    runs = select_reported(frame).drop_duplicates("cell")
    scores = select_scores(select_finished(frame))
    primary = scores[scores["primary"]]
    costs = pivot_costs(frame)
    rows = []
    for label, own in runs.groupby("label", sort=False):
        by_task = primary[primary["label"] == label].groupby("task", sort=False)["value"].apply(list)
        rows.append(
            {
                "label": str(label),
                "method": own["method"].iloc[0],
                "preset": own["preset"].iloc[0] or "published",
                "baseline": is_baseline(str(own["method"].iloc[0])),
                "seeds": [int(seed) for seed in own["seed"]],
                "cells": own["cell"].tolist(),
                "status": sorted(own["status"].unique()),
                "scores": {str(task): [_number(value) for value in values] for task, values in by_task.items()},
                "rate": float(own["learning_rate"].iloc[0]),
                "parameters": _median(costs, str(label), "parameters.adapter"),
                "added": _median(costs, str(label), "parameters.added_by_task"),
                "merges": _merges(costs, str(label)),
                "step": _median(costs, str(label), "timing.train_over_bare"),
                "seconds": _median(costs, str(label), "timing.train_step.median"),
                "memory": _median(costs, str(label), "memory.peak_bytes"),
            }
        )
    return rows


def _merges(costs: pd.DataFrame, label: str) -> str:
    """Whether the update folds into the weights: one for all tasks, one for each, or not at all."""
    merges, added = _median(costs, label, "parameters.mergeable"), _median(costs, label, "parameters.added_by_task")
    if merges is None:
        return "n/a"
    return "no" if not merges else "per task" if added else "yes"


def _median(costs: pd.DataFrame, label: str, column: str) -> float | None:
    """Median over the runs of a method; None where nothing was measured."""
    if column not in costs.columns:
        return None
    values = costs.loc[costs.index.get_level_values("label") == label, column].dropna()
    return None if values.empty else float(values.median())


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


# ---------------------------------------------------------------------- curves, pairs, routing


def average_curves(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Task loss over steps, the mean over seeds; with the seconds that so many steps take."""
    losses = select_finished(frame)
    losses = losses[losses["metric"] == "loss.task"]
    costs = pivot_costs(frame)
    points = []
    for label, own in losses.groupby("label", sort=False):
        means = own.groupby("step")["value"].mean()
        curve = list(zip(means.index.astype(int).tolist(), means.tolist(), strict=True))
        seconds = _median(costs, str(label), "timing.train_step.median")
        stride = max(1, len(curve) // CURVE_POINTS)
        points += [
            {
                "label": str(label),
                "step": step,
                "seconds": None if seconds is None else round(step * seconds, 2),
                "loss": round(value, 5),
            }
            for step, value in curve[::stride]
        ]
    return points


def compare_pairs(frame: pd.DataFrame, outcomes: pd.DataFrame, endpoint: Endpoint) -> list[dict[str, Any]]:
    """Every pair of methods, p-values adjusted by Holm over all pairs. Baselines are left out.

    A pair of one seed is never decided: its interval does not know the noise of training.
    """
    found = compare_all_pairs(frame, outcomes, endpoint)
    if not found:
        return []
    adjusted = multipletests([difference.p_value for *_, difference in found], method="holm")[1]
    return [
        {
            "first": first,
            "second": second,
            "difference": round(100 * difference.estimate, 2),
            "half": round(100 * difference.half_width, 2),
            "p": float(p),
            "decided": bool(p < 0.05 and difference.seeds > 1),
            "seeds": difference.seeds,
        }
        for (first, second, difference), p in zip(found, adjusted, strict=True)
    ]


def average_routing(record: RunRecord) -> dict[str, Any] | None:
    """How a run uses its experts, by layer and task: the mean gate over the sites of a layer."""
    routing = record.routing
    if routing is None or record.status != "ok":
        return None
    points: dict[tuple[int, str], list[np.ndarray]] = {}
    for site in routing.sites:
        for task, usage in zip(routing.tasks, site.weights, strict=True):
            points.setdefault((site.layer if site.layer is not None else -1, task), []).append(np.asarray(usage))
    cells = [
        {"layer": layer, "task": task, "expert": expert, "gate": round(float(gate), 4)}
        for (layer, task), usages in sorted(points.items())
        if len({len(usage) for usage in usages}) == 1
        for expert, gate in enumerate(np.mean(usages, axis=0))
    ]
    return {"method": record.cell.method, "seed": record.cell.seed, "cell": record.cell.id, "cells": cells}


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % interval over seeds; None for one seed."""
    if len(values) < 2:
        return float(np.mean(values)), None
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(half)


def gather_tables(folder: Path) -> list[Mapping[str, Any]]:
    """Finished tables of a folder (mechanisms, claims, speed): title, columns, rows and notes, from their Markdown."""
    return [table for path in sorted(folder.glob("*.md")) for table in read_tables(path)]


def read_tables(path: Path) -> list[dict[str, Any]]:
    """The tables of a Markdown file that this project wrote: a heading, the table, its notes as a list.

    `under` is the heading of the second level that a table stands under.
    """
    tables: list[dict[str, Any]] = []
    title, under, inside = path.stem, "", False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and not inside:
            columns = _read_cells(line)
            about = {"title": title, "under": under, "file": path.as_posix()}
            tables.append(about | {"columns": columns, "rows": [], "notes": []})
        elif line.startswith("|") and not set(line) <= set("|:- "):
            tables[-1]["rows"].append(_read_cells(line))
        elif line.startswith("#"):
            title = line.lstrip("# ")
            under = title if line.startswith("## ") else under
        elif line.startswith("- ") and tables:
            tables[-1]["notes"].append(line[2:])
        inside = line.startswith("|")
    return tables


def _read_cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
