"""Which figures the records of one protocol allow, each drawn when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from benchmarks.records.comparable import Group
from benchmarks.reporting.figures.curves import draw_curves
from benchmarks.reporting.figures.embeddings import draw_embeddings
from benchmarks.reporting.figures.experts import draw_routing
from benchmarks.reporting.figures.ranks import draw_ranks
from benchmarks.reporting.figures.style import Style, choose_styles
from benchmarks.reporting.figures.trade_off import Interval, Point, draw_trade_off
from benchmarks.reporting.ranks import can_rank, pivot_scores
from benchmarks.reporting.scores import MethodScores, rank_rows
from benchmarks.reporting.views import count_runs, is_baseline, name_protocol, pivot_costs, select_finished

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawings = dict[str, Callable[[], "Figure"]]
STEP = "timing.train_step"


def plan_figures(frame: pd.DataFrame, group: Group) -> Drawings:
    """The figures of a protocol by name; a name without what it needs in the records is left out.

    Args:
        frame: the long frame of one protocol.
        group: the same records; how runs route their tasks is in no frame.
    """
    runs = count_runs(frame)
    baselines = [str(label) for label, method in runs["method"].items() if is_baseline(str(method))]
    styles = choose_styles([str(label) for label in runs.index if label not in baselines], baselines)
    return {
        **_plan_trade_offs(frame, styles),
        **_plan_curves(frame, baselines, styles),
        **_plan_ranks(frame, styles),
        **_plan_routing(group),
    }


def _plan_trade_offs(frame: pd.DataFrame, styles: dict[str, Style]) -> Drawings:
    rows = [row for row in rank_rows(frame) if row.averaged]
    most = max((len(row.averaged) for row in rows), default=0)
    # Means over fewer tasks do not compare, and are not drawn.
    whole = [row for row in rows if len(row.averaged) == most]
    baselines = {row.label: _measure_score(row).value for row in whole if is_baseline(row.method)}
    costs = {
        "score-parameters": (_measure_parameters(frame), "trainable adapter parameters (heads apart)"),
        "score-step-time": (_measure_steps(frame), "training step, ms (median, 10th to 90th percentile)"),
    }
    drawings: Drawings = {}
    for name, (by_label, cost) in costs.items():
        points = [
            Point(row.label, by_label[row.label], _measure_score(row))
            for row in whole
            if row.label not in baselines and row.label in by_label
        ]
        if points:
            drawings[name] = partial(
                draw_trade_off, points, baselines, styles,
                title=name_protocol(frame), cost=cost, score=f"mean score over {most} tasks, points",
            )  # fmt: skip
    return drawings


def _measure_score(row: MethodScores) -> Interval:
    assert row.mean is not None
    assert row.mean.mean is not None
    middle, half = 100 * row.mean.mean, 100 * (row.mean.half_width or 0.0)
    return Interval(middle, middle - half, middle + half)


def _measure_parameters(frame: pd.DataFrame) -> dict[str, Interval]:
    sizes = pivot_costs(frame).reindex(columns=["parameters.adapter"])["parameters.adapter"].groupby("label").first()
    return {str(label): Interval(size, size, size) for label, size in sizes.items() if size > 0}


def _measure_steps(frame: pd.DataFrame) -> dict[str, Interval]:
    columns = [f"{STEP}.{quantile}" for quantile in ("median", "p10", "p90")]
    steps = 1e3 * pivot_costs(frame).reindex(columns=columns).groupby("label").median().dropna()
    return {str(label): Interval(*values) for label, values in zip(steps.index, steps.to_numpy(), strict=True)}


def _plan_curves(frame: pd.DataFrame, baselines: list[str], styles: dict[str, Style]) -> Drawings:
    losses = select_finished(frame).query("metric == 'loss.task'")[["label", "seed", "step", "value"]]
    if losses.empty:
        return {}
    base = next((label for label in baselines if label in set(losses["label"])), None)
    return {"training-curves": partial(draw_curves, losses, base, styles, name_protocol(frame))}


def _plan_ranks(frame: pd.DataFrame, styles: dict[str, Style]) -> Drawings:
    scores = pivot_scores(frame)
    if not can_rank(scores):
        return {}
    return {"critical-difference": partial(draw_ranks, scores, styles, name_protocol(frame))}


def _plan_routing(group: Group) -> Drawings:
    """The figures of every method's first run that recorded its routing."""
    drawings: Drawings = {}
    for runs in group.rows:
        record = next((record for record in runs.finished if record.routing is not None), None)
        if record is None or record.routing is None:
            continue
        routing, seed = record.routing, f"seed {record.cell.seed}"
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", runs.label).strip("_")
        if routing.sites:
            title = f"{runs.label}: experts by task ({seed}, {max(routing.rows.values())} rows per task)"
            drawings[f"routing-{stem}"] = partial(draw_routing, title, routing)
        if routing.embeddings is not None and len(routing.tasks) > 1:
            title = f"{runs.label}: task embeddings, principal components ({seed})"
            drawings[f"task-embeddings-{stem}"] = partial(draw_embeddings, title, routing.tasks, routing.embeddings)
    return drawings
