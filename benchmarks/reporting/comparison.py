"""The table of verdicts: every method against a named reference, in pairs of runs of the same seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.records.schema import RunRecord
from benchmarks.records.store import RecordError
from benchmarks.reporting.comparable import Group, MethodRuns
from benchmarks.reporting.render import Table
from benchmarks.reporting.scores import method_scores
from benchmarks.statistics.intervals import EQUIVALENCE_BAND, Difference, holm, seeds_to_settle, verdict
from benchmarks.statistics.paired import PairedTask, metric_value, paired_difference

LoadOutcomes = Callable[[RunRecord], pd.DataFrame]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One method against the reference, over the tasks that both have scores for."""

    label: str
    difference: Difference
    tasks: int


def comparison_table(
    group: Group, load_outcomes: LoadOutcomes, reference: str, band: float = EQUIVALENCE_BAND
) -> Table | None:
    """Differences, Holm-adjusted p-values and verdicts; None when there is nothing to compare."""
    base = group.row(reference)
    if base is None:
        return None
    pairs = _Pairs(group, base, load_outcomes)
    others = [runs for runs in group.rows if runs is not base and not _is_untrained(runs)]
    found = [comparison for runs in others if (comparison := pairs.compare(runs)) is not None]
    if not found:
        return None
    adjusted = holm([comparison.difference.p_value for comparison in found])
    facts = [_facts(comparison, float(p), band, len(found)) for comparison, p in zip(found, adjusted, strict=True)]
    left_out = [runs.label for runs in others if runs.label not in {comparison.label for comparison in found}]
    return Table(
        "comparison",
        f"Compared with {base.label} ({group.label})",
        pd.DataFrame([_cells(fact, len(group.tasks)) for fact in facts]),
        pd.DataFrame(facts),
        _notes(band, left_out, is_single=any(comparison.difference.seeds == 1 for comparison in found)),
    )


def equivalence_band(group: Group) -> float:
    """The differences that count as none, as a share; protocols tell it in points."""
    return group.protocol.equivalence_band / 100


class _Pairs:
    """Reads outcomes once per run and pairs them up."""

    def __init__(self, group: Group, base: MethodRuns, load_outcomes: LoadOutcomes) -> None:
        self.group = group
        self.base = base
        self.load_outcomes = load_outcomes
        self.loaded: dict[str, pd.DataFrame] = {}

    def compare(self, runs: MethodRuns) -> Comparison | None:
        both = {record.cell.seed: record for record in self.base.finished if record.outcomes}
        own = {record.cell.seed: record for record in runs.finished if record.outcomes}
        seeds = sorted(both.keys() & own.keys())
        defined = [set(method_scores(side, self.group.tasks).averaged) for side in (runs, self.base)]
        tasks = [task for task in self.group.tasks if task in defined[0] & defined[1]]
        if not seeds or not tasks:
            return None
        paired = [self._paired(task, [own[seed] for seed in seeds], [both[seed] for seed in seeds]) for task in tasks]
        return Comparison(runs.label, paired_difference(paired), len(tasks))

    def _paired(self, task: str, own: Sequence[RunRecord], base: Sequence[RunRecord]) -> PairedTask:
        frames = [self._rows(record, task) for record in (*own, *base)]
        keys = frames[0][["index", "label"]]
        for record, frame in zip((*own, *base), frames, strict=True):
            if not frame[["index", "label"]].equals(keys):
                raise RecordError(
                    f"the outcomes of {record.cell.method}, seed {record.cell.seed} ({record.cell.id}) cover other "
                    f"examples of {task} than those of {own[0].cell.method}. Run the group again with --rerun all."
                )
        predictions = np.array([frame["prediction"].to_numpy(float) for frame in frames])
        labels = keys["label"].to_numpy(float)
        return PairedTask(own[0].scores[task].primary, labels, predictions[: len(own)], predictions[len(own) :])

    def _rows(self, record: RunRecord, task: str) -> pd.DataFrame:
        if record.cell.id not in self.loaded:
            self.loaded[record.cell.id] = self.load_outcomes(record).sort_values(["task", "index"])
        frame = self.loaded[record.cell.id]
        rows = frame[frame["task"] == task].reset_index(drop=True)
        score = record.scores[task]
        recorded = score.metrics[score.primary]
        labels, predictions = rows["label"].to_numpy(float), rows["prediction"].to_numpy(float)
        recomputed = metric_value(score.primary, labels, predictions) if len(rows) else None
        if recorded is None or recomputed is None or abs(recomputed - recorded) > 1e-6:
            raise RecordError(
                f"the outcomes of {record.cell.method}, seed {record.cell.seed} ({record.cell.id}) give "
                f"{score.primary} {recomputed} on {task}, the record says {recorded}: they do not belong together. "
                "Delete both files and run the same command again."
            )
        return rows


def _is_untrained(runs: MethodRuns) -> bool:
    sizes = [record.parameters for record in runs.records if record.parameters is not None]
    return bool(sizes) and all(size.adapter + size.heads == 0 for size in sizes)


def _facts(comparison: Comparison, adjusted_p: float, band: float, comparisons: int) -> dict[str, Any]:
    difference = comparison.difference
    decided = verdict(difference, adjusted_p, band)
    return {
        "method": comparison.label,
        "difference": difference.estimate,
        "half_width": difference.half_width,
        "p_value": difference.p_value,
        "p_holm": adjusted_p,
        "verdict": decided,
        "seeds": difference.seeds,
        "seeds_to_settle": seeds_to_settle(difference, band, comparisons) if decided == "undecided" else None,
        "tasks": comparison.tasks,
    }


def _cells(fact: dict[str, Any], tasks: int) -> dict[str, str]:
    needed = fact["seeds_to_settle"]
    if fact["verdict"] != "undecided":
        settled = "-"
    elif fact["seeds"] < 2:
        settled = "unknown"
    else:
        settled = "more test rows" if needed is None else str(needed)
    return {
        "method": fact["method"],
        "difference": f"{100 * fact['difference']:+z.1f} ± {100 * fact['half_width']:.1f}",
        "p (Holm)": "< 0.001" if fact["p_holm"] < 0.001 else f"{fact['p_holm']:.3f}",
        "verdict": fact["verdict"],
        "seeds": str(fact["seeds"]),
        "seeds to settle": settled,
        "tasks": f"{fact['tasks']} of {tasks}",
    }


def _notes(band: float, left_out: Sequence[str], *, is_single: bool) -> tuple[str, ...]:
    method = (
        "Difference of the mean over tasks, in points, with its 95 % interval: paired by seed and by test example, "
        "examples resampled within tasks, runs by Student t; p-values adjusted by Holm over the rows of this table."
    )
    meaning = (
        f"Equivalent: the whole interval lies within ± {100 * band:g}. Better or worse: adjusted p below 0.05. "
        "Undecided: neither; then the number of seeds that would settle it at the measured spread, all rows compared."
    )
    notes = [method, meaning]
    if is_single:
        notes.append("With one seed the interval knows the test examples only, not the noise of training: undecided.")
    if left_out:
        notes.append(f"Not compared, for want of finished runs with outcomes in common: {', '.join(left_out)}.")
    return tuple(notes)
