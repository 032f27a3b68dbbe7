"""The table of wrong ids: what methods that are routed by task ids lose when they are told another task."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.reporting.render import Table
from benchmarks.reporting.views import name_protocol, select_finished
from benchmarks.statistics.intervals import mean_interval

PREFIX = "swapped."
LOST = "swapped.lost"


def swapped_tables(frame: pd.DataFrame) -> list[Table]:
    """Mean skill under the right and the wrong ids, by method; none where no method is routed by ids."""
    rows = select_finished(frame)
    rows = rows[rows["metric"].str.startswith(PREFIX, na=False)]
    if rows.empty:
        return []
    told = rows[rows["metric"] != LOST].assign(told=rows["metric"].str.removeprefix(PREFIX))
    lines, facts = [], []
    for label, own in told.groupby("label", sort=False):
        is_right = own["task"] == own["told"]
        by_seed = {
            "right id": own[is_right].groupby("cell", sort=False)["value"].mean(),
            "wrong id": own[~is_right].groupby("cell", sort=False)["value"].mean(),
            "lost": rows[(rows["label"] == label) & (rows["metric"] == LOST)].set_index("cell")["value"],
        }
        lines.append({"method": str(label), **{name: _cell(values) for name, values in by_seed.items()}})
        matrix = own.groupby(["task", "told"], sort=False)["value"].mean().rename("skill").reset_index()
        facts.append(matrix.assign(method=str(label)))
    note = (
        "Skill times 100 on the first rows of every task, under the task's own id and under all others; heads are "
        "always the task's own. Lost: the difference; 0: the method does not listen to ids. The CSV has every pair of "
        "tasks."
    )
    data = pd.concat(facts)[["method", "task", "told", "skill"]]
    return [Table("swapped", f"Wrong ids ({name_protocol(frame)})", pd.DataFrame(lines), data, (note,))]


def _cell(values: pd.Series[float]) -> str:
    mean, half = mean_interval(values)
    return f"{100 * mean:z.1f}" + ("" if np.isnan(half) else f" ± {100 * half:.1f}")
