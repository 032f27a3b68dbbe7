"""The last lines of a run: what its tables can tell, and what they cannot."""

from __future__ import annotations

from benchmarks.records.comparable import Group
from benchmarks.reporting.render import Table

DECIDED = ("better", "worse", "equivalent")


def tell_limits(group: Group, comparison: Table | None) -> str:
    """One sentence on what a comparison decides, and one on what no number of it can say.

    Args:
        group: the runs.
        comparison: their table of verdicts; None where nothing is compared.
    """
    protocol = group.protocol
    seeds = len({record.cell.seed for record in group.records})
    budget = f"{protocol.steps:,} steps of {protocol.batch_size:,} rows and {seeds} seed{'s' if seeds > 1 else ''}"
    if comparison is None:
        decided = "they compare nothing: one method ran, and --methods takes several"
    else:
        verdicts = comparison.data["verdict"]
        decided = f"they decide {int(verdicts.isin(DECIDED).sum())} of {len(verdicts)} comparisons"
    noise = "how much of a difference is the noise of training (--seeds 0,1,2 tells), " if seeds == 1 else ""
    return (
        f"What the tables of {group.label} tell: after {budget} {decided}. They cannot tell {noise}"
        f"where a method ends with more steps (--steps), nor how it fares on other data (--tasks)."
    )
