"""The table of trainable numbers; the task heads, which all methods share, stand apart."""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmarks.reporting.render import Table
from benchmarks.reporting.views import NOT_AVAILABLE, count_runs, fill_gaps, name_protocol, select_reported

PREFIX = "parameters."


class InconsistentRecordsError(ValueError):
    """Runs that should agree (parameter counts of one configuration) do not."""


def parameters_table(frame: pd.DataFrame) -> Table:
    """One row per method, from any of its runs; all runs of a method must count alike."""
    lines: list[dict[str, str]] = []
    facts: list[dict[str, Any]] = []
    for label, failure in count_runs(frame)["failure"].items():
        counts = find_counts(frame, str(label))
        if not counts:
            lines.append({"method": str(label), "sites": failure or NOT_AVAILABLE})
            facts.append({"method": label, "status": failure or "ok"})
            continue
        lines.append({"method": str(label), **_format(counts)})
        facts.append({"method": label, **counts, **_derive(counts), "status": failure or "ok"})
    tasks = next((fact["tasks"] for fact in facts if "tasks" in fact), 0)
    notes = (
        (
            "Adapter: trainable numbers without the task heads, counted from the modules; per task: divided by the "
            f"number of tasks ({tasks}), as the papers do; closed form: the method's own formula."
        ),
        (
            "Fixed: what does not grow with the tasks. Added by one more task: the closed form for one task more, less "
            "that for these tasks. After merging: what is left beside the plain model."
        ),
    )
    title = f"Trainable parameters ({name_protocol(frame)})"
    return Table("parameters", title, fill_gaps(lines), pd.DataFrame(facts), notes)


def find_counts(frame: pd.DataFrame, label: str) -> dict[str, int]:
    """The counts of a label by name, as its records have them; empty where none was counted.

    Raises:
        InconsistentRecordsError: runs count differently.
    """
    rows = select_reported(frame)
    rows = rows[(rows["label"] == label) & rows["metric"].str.startswith(PREFIX, na=False)]
    values = rows.groupby("metric", sort=False)["value"]
    if (values.nunique() > 1).any():
        adapters = rows[rows["metric"] == f"{PREFIX}adapter"]["value"].unique()
        raise InconsistentRecordsError(
            f"the runs of {label} count their parameters differently ({', '.join(f'{n:.0f}' for n in adapters)} "
            "adapter numbers): they were made by different versions of the code. Run them again with --rerun all."
        )
    return {str(metric).removeprefix(PREFIX): int(value) for metric, value in values.first().items()}


def _derive(counts: dict[str, int]) -> dict[str, float | None]:
    added = counts.get("added_by_task")
    return {
        "adapter_per_task": counts["adapter"] / counts["tasks"],
        "fixed": None if added is None else counts["adapter"] - added * counts["tasks"],
        "after_merging": 0 if counts.get("mergeable") else None,
        "share_of_base": counts["adapter"] / counts["base"] if counts["base"] else None,
    }


def _format(counts: dict[str, int]) -> dict[str, str]:
    derived = _derive(counts)
    share = derived["share_of_base"]
    return {
        "sites": str(counts["sites"]),
        "adapter": f"{counts['adapter']:,}",
        "per task": f"{derived['adapter_per_task']:,.0f}",
        "fixed": _format_count(derived["fixed"]),
        "added by one more task": _format_count(counts.get("added_by_task")),
        "after merging": {None: NOT_AVAILABLE, 0: "not mergeable", 1: "0"}[counts.get("mergeable")],
        "shared by sites": f"{counts['adapter_shared']:,}",
        "closed form": f"{counts['adapter_closed_form']:,}",
        "= counted": "yes" if counts["adapter"] == counts["adapter_closed_form"] else "NO",
        "% of backbone": NOT_AVAILABLE if share is None else f"{100 * share:.3f}",
        "heads": f"{counts['heads']:,}",
    }


def _format_count(count: float | None) -> str:
    return NOT_AVAILABLE if count is None else f"{count:,.0f}"
