"""The table of verdicts: every method against a named reference, in pairs of runs of the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

from benchmarks.records.store import RecordError
from benchmarks.reporting.endpoint import FIRST_METRIC, Endpoint
from benchmarks.reporting.render import Table
from benchmarks.reporting.scores import average_scores
from benchmarks.reporting.tuning import find_trials
from benchmarks.reporting.views import (
    NOT_AVAILABLE,
    count_runs,
    find_label,
    find_tasks,
    is_baseline,
    name_protocol,
    pivot_costs,
    select_finished,
    select_reported,
)
from benchmarks.statistics.intervals import EQUIVALENCE_BAND, Difference, level_at_each_of, verdict
from benchmarks.statistics.moderated import moderate_all
from benchmarks.statistics.paired import PairedTask, metric_value, paired_difference

AT_EDGE = "at the edge of its grid"
REFERENCE_AT_EDGE = "reference at the edge of its grid"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One method against the reference, over the tasks that both have scores for."""

    label: str
    is_baseline: bool
    difference: Difference
    tasks: int


def comparison_table(
    frame: pd.DataFrame,
    outcomes: pd.DataFrame,
    reference: str,
    band: float = EQUIVALENCE_BAND,
    endpoint: Endpoint = FIRST_METRIC,
) -> Table | None:
    """Differences, Holm-adjusted p-values and verdicts; None when there is nothing to compare.

    Args:
        frame: the long frame of one protocol.
        outcomes: the predictions of its runs, as `Results.outcomes` gives them.
        reference: a label, or a method that has one label.
        band: differences that count as none, as a share.
        endpoint: what is compared.

    Raises:
        RecordError: outcomes that do not belong to the scores, or that cover other rows than those of another run.
    """
    runs = count_runs(frame)
    base = find_label(runs, reference)
    if base is None:
        return None
    trained = _find_trained(frame)
    others = [str(label) for label in runs.index if label != base and label in trained]
    pairs = _Pairs(frame, outcomes, base, endpoint)
    compared = [
        Comparison(label, is_baseline(str(runs.loc[label, "method"])), *pair)
        for label in others
        if (pair := pairs.compare(label)) is not None
    ]
    if not compared:
        return None
    edges = {trials.method for trials in find_trials(frame, endpoint) if trials.at_edge}
    facts = _facts(compared, base, edges, band)
    left_out = [label for label in others if label not in {comparison.label for comparison in compared}]
    return Table(
        "comparison",
        f"Compared with {base} ({name_protocol(frame)})",
        pd.DataFrame([_cells(fact, len(endpoint.tasks or find_tasks(select_reported(frame)))) for fact in facts]),
        pd.DataFrame(facts),
        _notes(band, endpoint, left_out, is_single=any(comparison.difference.seeds == 1 for comparison in compared)),
    )


def compare_pair(
    frame: pd.DataFrame, outcomes: pd.DataFrame, method: str, than: str, endpoint: Endpoint = FIRST_METRIC
) -> Difference | None:
    """The difference of two methods; None where they have no runs of a seed in common.

    Args:
        frame: the long frame of one protocol.
        outcomes: the predictions of its runs, as `Results.outcomes` gives them.
        method: a label, or a method that has one label.
        than: the same.
        endpoint: what is compared.
    """
    runs = count_runs(frame)
    own, base = find_label(runs, method), find_label(runs, than)
    if own is None or base is None:
        return None
    compared = _Pairs(frame, outcomes, base, endpoint).compare(own)
    return None if compared is None else compared[0]


def compare_all_pairs(
    frame: pd.DataFrame, outcomes: pd.DataFrame, endpoint: Endpoint = FIRST_METRIC
) -> list[tuple[str, str, Difference]]:
    """The difference of every pair of methods that have runs of a seed in common; baselines are left out.

    Args:
        frame: the long frame of one protocol.
        outcomes: the predictions of its runs, as `Results.outcomes` gives them.
        endpoint: what is compared.
    """
    runs = count_runs(frame)
    labels = [str(label) for label in runs.index if not is_baseline(str(runs.loc[label, "method"]))]
    found = []
    for number, base in enumerate(labels):
        pairs = _Pairs(frame, outcomes, base, endpoint)
        for label in labels[number + 1 :]:
            compared = pairs.compare(label)
            if compared is not None:
                found.append((label, base, compared[0]))
    return found


class _Pairs:
    """Finds the predictions of runs of the same seed."""

    def __init__(self, frame: pd.DataFrame, outcomes: pd.DataFrame, base: str, endpoint: Endpoint) -> None:
        self.base, self.looks = base, endpoint.looks
        self.averaged = {
            row.label: [task for task in row.averaged if task in endpoint.tasks or not endpoint.tasks]
            for row in average_scores(frame)
        }
        finished = select_finished(frame)
        self.runs = finished.drop_duplicates("cell")
        of_skill = endpoint.metric == "skill"
        self.compared = ("prior_log_likelihood", "log_likelihood") if of_skill else ("truth", "prediction")
        primary = finished[finished["metric"] == "skill"] if of_skill else finished[finished["primary"]]
        keys = zip(primary["cell"], primary["task"], strict=True)
        self.scores = dict(zip(keys, zip(primary["metric"], primary["value"], strict=True), strict=True))
        self.outcomes = {
            key: rows.sort_values("index").reset_index(drop=True) for key, rows in outcomes.groupby(["cell", "task"])
        }
        self.with_outcomes = {cell for cell, _ in self.outcomes}

    def compare(self, label: str) -> tuple[Difference, int] | None:
        own, base = self._find_cells(label), self._find_cells(self.base)
        seeds = sorted(own.keys() & base.keys())
        tasks = [task for task in self.averaged[self.base] if task in self.averaged[label]]
        if not seeds or not tasks:
            return None
        cells = [own[seed] for seed in seeds], [base[seed] for seed in seeds]
        return paired_difference([self._pair(task, *cells) for task in tasks], looks=self.looks), len(tasks)

    def _find_cells(self, label: str) -> dict[int, str]:
        runs = self.runs[self.runs["label"] == label]
        cells = zip(runs["seed"], runs["cell"], strict=True)
        return {int(seed): str(cell) for seed, cell in cells if cell in self.with_outcomes}

    def _pair(self, task: str, own: Sequence[str], base: Sequence[str]) -> PairedTask:
        rows = [self._read(cell, task) for cell in (*own, *base)]
        keys = rows[0][["index", "truth"]]
        for other in rows:
            if not other[["index", "truth"]].equals(keys):
                raise RecordError(
                    f"the outcomes of {_name_run(other)} cover other examples of {task} than those of "
                    f"{_name_run(rows[0])}. Run both again with --rerun all."
                )
        truth, prediction = self.compared
        predictions = np.array([each[prediction].to_numpy(float) for each in rows])
        metric = self.scores[own[0], task][0]
        return PairedTask(metric, rows[0][truth].to_numpy(float), predictions[: len(own)], predictions[len(own) :])

    def _read(self, cell: str, task: str) -> pd.DataFrame:
        """The predictions of a run on a task, which must give the recorded score."""
        rows = self.outcomes[cell, task]
        metric, recorded = self.scores[cell, task]
        truth, predictions = (rows[column].to_numpy(float) for column in self.compared)
        recomputed = metric_value(metric, truth, predictions)
        if not abs(recomputed - recorded) <= 1e-6:
            raise RecordError(
                f"the outcomes of {_name_run(rows)} give {metric} {recomputed} on {task}, the record says {recorded}: "
                "they do not belong together. Delete both files and run the same command again."
            )
        return rows


def _name_run(outcomes: pd.DataFrame) -> str:
    first = outcomes.iloc[0]
    return f"{first['label']}, seed {first['seed']} ({first['cell']})"


def _find_trained(frame: pd.DataFrame) -> set[str]:
    """Labels of what has trainable numbers; a label that counts none in its records is taken to have them."""
    sizes = pivot_costs(frame).reindex(columns=["parameters.adapter", "parameters.heads"]).sum(axis=1, min_count=1)
    largest = sizes.groupby("label").max()
    return {str(label) for label in count_runs(frame).index if largest.get(label, 1) != 0}


def _facts(compared: Sequence[Comparison], base: str, edges: set[str], band: float) -> list[dict[str, Any]]:
    p_values = np.array([comparison.difference.p_value for comparison in compared])
    # Nobody asks whether a method beats a baseline that adapts nothing: such rows would only cost the others power.
    family = np.array([not comparison.is_baseline for comparison in compared])
    adjusted = p_values.copy()
    if family.any():
        adjusted[family] = multipletests(p_values[family], method="holm")[1]
    moderated = np.full(len(compared), np.nan)
    learnt = moderate_all([comparison.difference for comparison in compared if not comparison.is_baseline])
    if learnt is not None:
        moderated[family] = multipletests([difference.p_value for difference in learnt], method="holm")[1]
    facts = []
    for comparison, p_holm, p_moderated in zip(compared, adjusted, moderated, strict=True):
        difference, number = comparison.difference, 1 if comparison.is_baseline else int(family.sum())
        said: str = verdict(difference, float(p_holm), band)
        if edges & {base, comparison.label}:
            said = REFERENCE_AT_EDGE if base in edges else AT_EDGE
        facts.append(
            {
                "method": comparison.label,
                "difference": difference.estimate,
                "half_width": difference.half_width,
                "p_value": difference.p_value,
                "p_holm": float(p_holm),
                "p_moderated": float(p_moderated),
                "verdict": said,
                "seeds": difference.seeds,
                "detectable": difference.find_detectable(number),
                "tasks": comparison.tasks,
            }
        )
    return facts


def _show_p(value: float) -> str:
    return NOT_AVAILABLE if np.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _cells(fact: dict[str, Any], tasks: int) -> dict[str, str]:
    return {
        "method": fact["method"],
        "difference": f"{100 * fact['difference']:+z.1f} ± {100 * fact['half_width']:.1f}",
        "p (Holm)": _show_p(fact["p_holm"]),
        "p moderated": _show_p(fact["p_moderated"]),
        "verdict": fact["verdict"],
        "seeds": str(fact["seeds"]),
        "detectable": "unknown" if np.isnan(fact["detectable"]) else f"{100 * fact['detectable']:.1f}",
        "tasks": f"{fact['tasks']} of {tasks}",
    }


def _notes(band: float, endpoint: Endpoint, left_out: Sequence[str], *, is_single: bool) -> tuple[str, ...]:
    method = (
        f"Difference of the mean {endpoint.words}, in points, with its 95 % interval: paired by seed and by test "
        "example, runs by Student t, examples resampled within tasks (docs/tables.md); p-values adjusted by Holm over "
        "the methods of this table, baselines apart."
    )
    meaning = (
        f"Equivalent: the whole interval lies within ± {100 * band:g}. Better or worse: adjusted p below 0.05. "
        "Undecided: neither. No verdict where the best rate tried was the lowest or the highest: a better one may lie "
        "beyond."
    )
    power = (
        "Detectable: the true difference, in points, that so many seeds of this spread show with a probability of 80 % "
        "at the first step of Holm."
    )
    exploratory = (
        "p moderated: the same from variances that the comparisons of this table share in part (empirical Bayes, Smyth "
        "2004). It decides nothing: where comparisons are few it errs more often than it says (docs/tables.md)."
    )
    notes = [method, meaning, power, exploratory]
    if endpoint.looks > 1:
        notes.append(
            f"Looked at {endpoint.looks} times: intervals and p-values hold for all looks together, since each "
            f"decides at {100 * level_at_each_of(endpoint.looks):.2f} % (Pocock 1977)."
        )
    if is_single:
        notes.append("With one seed the interval knows the test examples only, not the noise of training: undecided.")
    if left_out:
        notes.append(f"Not compared, for want of finished runs with outcomes in common: {', '.join(left_out)}.")
    return tuple(notes)
