"""Tables of an experiment: scores beside bound and oracle, all pairs, wrong ids, and parameters at equal score."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from benchmarks.mechanisms.experiments import Experiment, Measure
from benchmarks.reporting.render import Table

LEVEL = 0.95
BOUND = "best task-blind answer"


def mechanism_tables(experiment: Experiment, frame: pd.DataFrame) -> list[Table]:
    """All tables of an experiment."""
    own = frame[frame["size"].isna()]
    tables = []
    if len(own):
        tables = [scores_table(experiment, own), pairs_table(experiment, own)]
        tables += [measure_table(experiment, own, measure) for measure in experiment.show]
    return [*tables, *([multipliers_table(experiment, frame)] if experiment.ranks_of_reference else [])]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and half of its 95 % interval by Student's t; half is NaN for one seed."""
    numbers = np.asarray(values, dtype=float)
    if len(numbers) < 2:
        return float(numbers.mean()), float("nan")
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, len(numbers) - 1))
    return float(numbers.mean()), quantile * float(numbers.std(ddof=1)) / len(numbers) ** 0.5


def shown(values: pd.Series) -> str:
    """Mean and half interval over the seeds, or how many of them failed."""
    known = values.dropna()
    if len(known) < len(values):
        return f"{len(values) - len(known)} of {len(values)} failed"
    mean, half = interval(known.tolist())
    return f"{mean:z.3f}" if np.isnan(half) else f"{mean:z.3f} ± {half:.3f}"


def scores_table(experiment: Experiment, frame: pd.DataFrame) -> Table:
    """Mean R2 over tasks by method and teacher; the bound above, the oracle below the others."""
    columns = _teachers(experiment, frame)
    order = [name for name in frame["method"].unique() if name != experiment.oracle]
    means = frame[_matches(frame, dict(columns.iloc[-1]))].groupby("method")["score"].mean()
    order = sorted(order, key=lambda name: -means.get(name, float("-inf")))
    rows = []
    bound = {"method": BOUND, "parameters": "-", "rate": "-"}
    seeds = frame[frame["method"] == experiment.reference]
    rows.append(bound | {_heading(where): shown(seeds[_matches(seeds, where)]["bound"]) for where in _each(columns)})
    for name in (*order, experiment.oracle):
        some = frame[frame["method"] == name]
        edge = " (edge)" if some["at_edge"].any() else ""
        facts = {"method": name, "parameters": _span(some["parameters"]), "rate": f"{some['rate'].iloc[0]:g}{edge}"}
        rows.append(facts | {_heading(where): shown(some[_matches(some, where)]["score"]) for where in _each(columns)})
    notes = (
        experiment.question,
        (
            "R2: the share of the tasks' updates that a student explains, mean over tasks; 1 is all, 0 the bare "
            "host's. ± is half of the 95 % interval of the mean over seeds (Student t); every seed has a teacher of "
            "its own."
        ),
        f"{BOUND}: no function of the input alone can have a higher mean R2 on these rows.",
        f"{experiment.oracle} is the oracle: what the tasks teach, without sharing.",
        (
            f"{experiment.lesson.steps} steps of {experiment.lesson.rows} rows; seeds "
            f"{', '.join(map(str, experiment.seeds))}; rates by successive halving on teachers of other seeds."
        ),
    )
    return Table(f"{experiment.name}-scores", f"Scores ({experiment.name})", pd.DataFrame(rows), frame, notes)


def p_of_zero(numbers: Sequence[float]) -> float:
    """Two-sided p-value of a mean of zero, by Student's t; 0 where all agree to the last digit, 1 where all are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(np.mean(numbers)) / np.float64(np.std(numbers, ddof=1) / len(numbers) ** 0.5)
    return 1.0 if np.isnan(t) else float(2 * stats.t.sf(t, len(numbers) - 1))


def pairs_table(experiment: Experiment, frame: pd.DataFrame) -> Table:
    """All pairs of methods, paired by seed: on every teacher where a word tells them apart, else on the last one."""
    teachers = _each(_teachers(experiment, frame))
    compared = teachers if any(isinstance(value, str) for value in teachers[0].values()) else teachers[-1:]
    parts = [_test_pairs(frame[_matches(frame, where)]).assign(teacher=_heading(where)) for where in compared]
    data = _adjust(pd.concat(parts, ignore_index=True))
    columns = {
        "teacher": data["teacher"],
        "better": data["better"],
        "worse": data["worse"],
        "difference": [f"{d:.3f} ± {h:.3f}" for d, h in zip(data["difference"], data["half"], strict=True)],
        "p (Holm)": [f"{p:.3g}" for p in data["p_holm"]],
        "verdict": ["decided" if decided else "undecided" for decided in data["decided"]],
    }
    text = pd.DataFrame(columns).drop(columns=[] if len(compared) > 1 else ["teacher"])
    notes = (
        (
            f"{int(data['decided'].sum())} of {len(data)} pairs are decided at "
            f"{', '.join(map(_heading, compared))}: paired t over seeds, adjusted by Holm over all pairs of this table."
        ),
    )
    return Table(f"{experiment.name}-pairs", f"All pairs ({experiment.name})", text, data, notes)


def compare_pairs(frame: pd.DataFrame, column: str = "score") -> pd.DataFrame:
    """Every pair of methods on one teacher, paired by seed.

    Args:
        frame: rows of the long frame of one teacher.
        column: what is compared.

    Returns:
        One row per pair: `better`, `worse`; `difference`, not negative, and `half` of its 95 % interval (Student t over
        seeds); `p`, two-sided; `p_holm`, adjusted over all rows; `decided`. Decided pairs first, the largest difference
        first.
    """
    return _adjust(_test_pairs(frame, column))


def _test_pairs(frame: pd.DataFrame, column: str = "score") -> pd.DataFrame:
    """The rows of `compare_pairs` as they are tested: the better method first."""
    scores = frame.pivot_table(index="seed", columns="method", values=column, dropna=False)
    tested = []
    for first, second in combinations(scores.columns, 2):
        difference = (scores[first] - scores[second]).dropna()
        if len(difference) < 2:
            continue
        p = p_of_zero(difference.tolist())
        mean, half = interval(difference.tolist())
        better, worse = (second, first) if mean < 0 else (first, second)
        tested.append({"better": better, "worse": worse, "difference": abs(mean), "half": half, "p": p})
    return pd.DataFrame(tested, columns=["better", "worse", "difference", "half", "p"])


def _adjust(tested: pd.DataFrame) -> pd.DataFrame:
    """Holm's adjustment over all rows; decided rows first, the largest difference first."""
    adjusted = multipletests(tested["p"].fillna(1.0), method="holm")[1] if len(tested) else []
    data = tested.assign(p_holm=adjusted)
    data["decided"] = data["p_holm"] < 1 - LEVEL
    return data.sort_values(["decided", "difference"], ascending=False, ignore_index=True)


MEASURES: dict[Measure, tuple[str, str]] = {
    "swap_loss": (
        "Wrong ids",
        "Mean R2 with the right id minus with a wrong one. 0: the method does not listen to ids.",
    ),
    "forgotten": (
        "Tasks added later",
        "Mean R2 that the tasks taught first lost while the others were taught. 0: nothing is forgotten.",
    ),
    "largest_share": (
        "Load of the experts",
        "Share of the largest expert in all gates at the end. 1: collapse. One over the number of experts: balance.",
    ),
    "follows_size": (
        "Size of the chosen experts",
        (
            "Spearman's correlation over tasks: the teacher's scale or rank with the mean size of the chosen experts. "
            "0: the choice does not follow the truth."
        ),
    ),
}


def measure_table(experiment: Experiment, frame: pd.DataFrame, measure: Measure) -> Table:
    """One further measure by method and teacher."""
    columns = _teachers(experiment, frame)
    title, note = MEASURES[measure]
    rows = []
    for name, some in frame.groupby("method", sort=False):
        defined = some[some["status"] == "ok"]
        cells = {_heading(where): defined[_matches(defined, where)][measure] for where in _each(columns)}
        texts = {heading: "-" if values.isna().all() else shown(values) for heading, values in cells.items()}
        if set(texts.values()) != {"-"}:
            rows.append({"method": name, **texts})
    notes = (note, "-: the method has no such thing.")
    data = frame[["experiment", "method", *columns, "seed", measure, "run"]]
    text = pd.DataFrame(rows, columns=["method", *map(_heading, _each(columns))])
    return Table(f"{experiment.name}-{measure.replace('_', '-')}", f"{title} ({experiment.name})", text, data, notes)


# ---------------------------------------------------------------------- parameters at equal score


def multipliers_table(experiment: Experiment, frame: pd.DataFrame) -> Table:
    """How many times fewer parameters than the reference a method needs for the reference's score."""
    columns = _teachers(experiment, frame)
    rows, facts = [], []
    for where in _each(columns):
        some = frame[_matches(frame, where)]
        for name in [name for name in some["method"].unique() if name != experiment.reference]:
            row = {"method": name, "teacher": _heading(where)}
            for rank in experiment.ranks_of_reference:
                logs = [
                    multiplier(some[some["seed"] == seed], experiment.reference, str(name), rank)
                    for seed in experiment.seeds
                ]
                row[f"at rank {rank}"] = _shown_multiplier(logs)
                facts.append({**where, "method": name, "rank": rank, "log_multipliers": logs})
            rows.append(row)
    notes = (
        (
            f"Parameters of {experiment.reference} at that rank over the parameters at which the method reaches the "
            "same mean R2; above 1 the method needs fewer. The best score at each size or below is joined by straight "
            "lines over the logarithm of the parameters. The geometric mean over seeds, with its 95 % interval "
            "(Student t)."
        ),
        "never: no size reached the score on at least half of the seeds. always: the smallest size did.",
    )
    return Table(
        f"{experiment.name}-multipliers", "Parameters at equal score", pd.DataFrame(rows), pd.DataFrame(facts), notes
    )


def multiplier(frame: pd.DataFrame, reference: str, method: str, rank: int) -> float:
    """Logarithm of the multiplier for one seed and teacher.

    Returns:
        minus infinity if the method never reaches the score, infinity if its smallest size does, NaN if the reference
        failed.
    """
    target = frame[(frame["method"] == reference) & (frame["size"] == rank)].iloc[0]
    if pd.isna(target["score"]):
        return float("nan")
    curve = frame[frame["method"] == method].sort_values("parameters")
    parameters = np.log(curve["parameters"].to_numpy(dtype=float))
    reached = np.maximum.accumulate(curve["score"].fillna(-np.inf).to_numpy(dtype=float))
    if reached[-1] < target["score"]:
        return float("-inf")
    if reached[0] >= target["score"]:
        return float("inf")
    after = int(np.argmax(reached >= target["score"]))
    low, high = reached[after - 1], reached[after]
    share = 1.0 if not np.isfinite(low) else (target["score"] - low) / (high - low)
    needed = parameters[after - 1] + share * (parameters[after] - parameters[after - 1])
    return float(np.log(target["parameters"]) - needed)


def _shown_multiplier(logs: Sequence[float]) -> str:
    finite = [value for value in logs if np.isfinite(value)]
    if 2 * sum(value == float("-inf") for value in logs) >= len(logs):
        return "never"
    if 2 * sum(value == float("inf") for value in logs) > len(logs):
        return "always"
    mean, half = interval(finite)
    if np.isnan(half):
        return f"{np.exp(mean):.2g}"
    return f"{np.exp(mean):.2g} ({np.exp(mean - half):.2g} to {np.exp(mean + half):.2g})"


# ---------------------------------------------------------------------- columns


def _teachers(experiment: Experiment, frame: pd.DataFrame) -> pd.DataFrame:
    """The teachers of the experiment: one row each, the varied fields as columns."""
    return frame[list(experiment.vary)].drop_duplicates(ignore_index=True)


def _each(columns: pd.DataFrame) -> list[dict[str, object]]:
    return [dict(row) for _, row in columns.iterrows()]


def _matches(frame: pd.DataFrame, where: dict[str, object]) -> pd.Series:
    chosen = pd.Series(data=True, index=frame.index)
    for field, value in where.items():
        chosen &= frame[field] == value
    return chosen


def _heading(where: dict[str, object]) -> str:
    return ", ".join(
        f"{field} {value:g}" if isinstance(value, float | int) else str(value) for field, value in where.items()
    )


def _span(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return "-" if pd.isna(low) else f"{int(low):,}" if low == high else f"{int(low):,} to {int(high):,}"
