"""The table of skills: what a method's probabilities are worth, by task, and the mean that is the endpoint."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.reporting.endpoint import Endpoint
from benchmarks.reporting.render import Table
from benchmarks.reporting.views import NOT_AVAILABLE, count_runs, name_protocol, select_finished
from benchmarks.statistics.intervals import mean_interval

MEAN = "mean"
ERROR = "calibration error"


def skill_tables(frame: pd.DataFrame, endpoint: Endpoint) -> list[Table]:
    """Skill by task with its mean over the endpoint's tasks, and the calibration error; none without probabilities."""
    finished = select_finished(frame)
    skills = finished[finished["metric"] == "skill"]
    if skills.empty:
        return []
    errors = finished[finished["metric"] == "calibration_error"].dropna(subset="value")
    tasks = [str(task) for task in skills["task"].unique()]
    counted = [task for task in tasks if task in endpoint.tasks] if endpoint.tasks else tasks
    lines, facts = [], []
    for label, run in count_runs(frame).iterrows():
        own = skills[skills["label"] == label]
        columns = {task: own[own["task"] == task].set_index("cell")["value"] for task in tasks}
        columns[MEAN] = own[own["task"].isin(counted)].groupby("cell", sort=False)["value"].mean()
        columns[ERROR] = errors[errors["label"] == label].groupby("cell", sort=False)["value"].mean()
        lines.append({"method": str(label), **{name: _cell(values) for name, values in columns.items()}})
        facts += [
            {"method": str(label), "column": name, "mean": mean, "half_width": half, "seeds": int(run["finished"])}
            for name, values in columns.items()
            if len(values)
            for mean, half in [mean_interval(values)]
        ]
    lines.sort(key=lambda line: line["method"] != "majority")
    return [
        Table("skill", f"Skill ({name_protocol(frame)})", pd.DataFrame(lines), pd.DataFrame(facts), (_note(counted),))
    ]


def _cell(values: pd.Series[float]) -> str:
    if not len(values):
        return NOT_AVAILABLE
    mean, half = mean_interval(values)
    return f"{100 * mean:z.1f}" + ("" if np.isnan(half) else f" ± {100 * half:.1f}")


def _note(counted: list[str]) -> str:
    return (
        "Skill times 100: 1 - NLL / NLL(prior), 100 is certainty, 0 what the labels of the training rows tell without "
        "any text, less is overconfidence. Of scores the NLL is a normal density's whose variance is the mean squared "
        f"error. Mean over {', '.join(counted)}; ± is half of the 95 % interval over seeds. Calibration error: "
        "expected difference of confidence and accuracy over ten bins, mean over the tasks of classes and choices."
    )
