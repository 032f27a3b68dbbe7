"""The tables of parameters and of throughput; that of scores is in `benchmarks.reporting.scores`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import pandas as pd

from benchmarks.records.schema import Parameters, RunRecord
from benchmarks.reporting.comparable import Group, MethodRuns
from benchmarks.reporting.render import Table
from benchmarks.reporting.scores import NOT_AVAILABLE, scores_table

__all__ = ["parameters_table", "scores_table", "throughput_table"]

MEBIBYTE = 2**20
PHASES = ("train", "inference")

TOLERATED_SHARE = 0.05
"""What other processes may take of the processor during a timing pass without a mark."""

DISTURBED = "†"


class InconsistentRecordsError(ValueError):
    """Runs that should agree (parameter counts of one configuration) do not."""


def parameters_table(group: Group) -> Table:
    """Trainable numbers of every method; the task heads, which all methods share, stand apart."""
    lines: list[dict[str, str]] = []
    facts: list[dict[str, Any]] = []
    for runs in group.rows:
        parameters = _parameters(runs)
        if parameters is None:
            lines.append({"method": runs.label, "sites": runs.failure or NOT_AVAILABLE})
            facts.append({"method": runs.label, "status": runs.failure or "ok"})
            continue
        share = parameters.adapter / parameters.base if parameters.base else None
        counted = parameters.adapter == parameters.adapter_closed_form
        lines.append(
            {
                "method": runs.label,
                "sites": str(parameters.sites),
                "adapter": f"{parameters.adapter:,}",
                "per task": f"{parameters.adapter_per_task:,.0f}",
                "shared by sites": f"{parameters.adapter_shared:,}",
                "closed form": f"{parameters.adapter_closed_form:,}",
                "= counted": "yes" if counted else "NO",
                "% of backbone": NOT_AVAILABLE if share is None else f"{100 * share:.3f}",
                "heads": f"{parameters.heads:,}",
            }
        )
        facts.append(
            {
                "method": runs.label,
                **parameters.model_dump(),
                "adapter_per_task": parameters.adapter_per_task,
                "share_of_base": share,
                "status": runs.failure or "ok",
            }
        )
    notes = (
        (
            "Adapter: trainable numbers without the task heads, counted from the modules; per task: divided by the "
            f"number of tasks ({len(group.tasks)}); closed form: the method's own formula."
        ),
    )
    return Table(
        "parameters", f"Trainable parameters ({group.label})", _filled(lines, NOT_AVAILABLE), pd.DataFrame(facts), notes
    )


def throughput_table(group: Group, reference: str | None = None) -> Table:
    """Step times and memory of the timing pass, and the ratio to the step times of `reference`."""
    lines: list[dict[str, str]] = []
    facts: list[dict[str, Any]] = []
    untimed: list[str] = []
    base = group.row(reference) if reference is not None else None
    for runs in group.rows:
        timed = [record for record in runs.finished if record.train_step is not None]
        if runs.finished and not timed:
            untimed.append(runs.label)
            continue
        fact = _timing_facts(timed)
        if base is not None:
            fact |= _ratios(fact, _timing_facts(base.finished), base.label)
        lines.append(
            {"method": runs.label, **(_timing_cells(fact) if timed else {"train step ms [p10-p90]": runs.failure})}
        )
        facts.append({"method": runs.label, **fact, "status": runs.failure or "ok"})
    return Table(
        "throughput",
        f"Throughput and memory ({group.label})",
        _filled(lines or [{"method": "none timed"}], NOT_AVAILABLE),
        pd.DataFrame(facts or [{"method": "none timed"}]),
        (
            *_timing_notes(group),
            *_disturbance_notes(facts),
            *([f"Without a timing pass: {', '.join(untimed)}."] if untimed else []),
        ),
    )


def _parameters(runs: MethodRuns) -> Parameters | None:
    known = {record.parameters for record in runs.records if record.parameters is not None}
    if len(known) > 1:
        raise InconsistentRecordsError(
            f"the runs of {runs.label} count their parameters differently ({', '.join(str(p.adapter) for p in known)} "
            "adapter numbers): they were made by different versions of the code. Run them again with --rerun all."
        )
    return next(iter(known), None)


def _timing_facts(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Medians over the seeds, in seconds and bytes."""
    timings = [record.timing for record in records if record.timing is not None]
    memories = [record.memory for record in records if record.memory is not None]

    facts: dict[str, Any] = {}
    for phase in PHASES:
        steps = [getattr(timing, f"{phase}_step") for timing in timings]
        for quantile in ("median", "p10", "p90"):
            values = [None if step is None else getattr(step, quantile) for step in steps]
            facts[f"{phase}_step_{quantile}_seconds"] = _median(values)
        facts[f"{phase}_tokens_per_second"] = _median(
            [getattr(timing, f"{phase}_tokens_per_second") for timing in timings]
        )
        facts[f"{phase}_over_bare"] = _median([getattr(timing, f"{phase}_over_bare") for timing in timings])
    facts["peak_bytes"] = _median([memory.peak_bytes for memory in memories])
    facts["own_share"] = _median([timing.own_share for timing in timings])
    # Of several seeds the most disturbed one: its times are among those shown.
    facts["others_share"] = max((t.others_share for t in timings if t.others_share is not None), default=None)
    facts["train_seconds"] = _median([timing.train_seconds for timing in timings])
    return facts


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _ratios(facts: dict[str, Any], base: dict[str, Any], label: str) -> dict[str, Any]:
    ratios = {}
    for phase in PHASES:
        own, other = facts[f"{phase}_over_bare"], base[f"{phase}_over_bare"]
        ratios[f"{phase}_step_over_{label}"] = own / other if own is not None and other else None
    return ratios


def _timing_cells(facts: dict[str, Any]) -> dict[str, str]:
    def step(phase: str) -> str:
        middle, low, high = (facts[f"{phase}_step_{q}_seconds"] for q in ("median", "p10", "p90"))
        return NOT_AVAILABLE if middle is None else f"{1e3 * middle:.1f} [{1e3 * low:.1f}-{1e3 * high:.1f}]"

    def number(key: str, scale: float, digits: int) -> str:
        return NOT_AVAILABLE if facts[key] is None else f"{scale * facts[key]:,.{digits}f}"

    cells = {
        "train step ms [p10-p90]": step("train") + (f" {DISTURBED}" if _is_disturbed(facts) else ""),
        "train tokens/s": number("train_tokens_per_second", 1, 0),
        "inference ms [p10-p90]": step("inference"),
        "inference tokens/s": number("inference_tokens_per_second", 1, 0),
    }
    ratios = [key for key in facts if "_step_over_" in key]
    cells |= {key.replace("_step_over_", " time / "): number(key, 1, 2) for key in ratios}
    return cells | {
        "peak memory MiB": number("peak_bytes", 1 / MEBIBYTE, 0),
        "training s": number("train_seconds", 1, 1),
    }


def _is_disturbed(facts: dict[str, Any]) -> bool:
    share = facts.get("others_share")
    return share is not None and share > TOLERATED_SHARE


def _disturbance_notes(facts: Sequence[dict[str, Any]]) -> list[str]:
    disturbed = [f"{fact['method']} {100 * fact['others_share']:.0f} %" for fact in facts if _is_disturbed(fact)]
    if not disturbed:
        return []
    note = (
        f"{DISTURBED} During the timing pass other processes took processor time from this one's cores: "
        f"{', '.join(disturbed)}. Read these times as rough."
    )
    return [note]


def _timing_notes(group: Group) -> tuple[str, ...]:
    kinds = dict.fromkeys(record.memory.kind for record in group.records if record.memory is not None)
    shape = group.protocol.timing
    apart = (
        f"Timing pass apart from training: steps of {shape.rows} sequences of {shape.length} tokens, warm-up excluded, "
        "device synchronised; median and percentiles of a run, medians over seeds. "
        "Training s: the optimiser steps of the run itself."
    )
    compared = (
        "Cells are timed minutes apart. Ratios are of steps in units of the bare model's forward, which took turns "
        "with them, so that they hold although a machine's speed drifts."
    )
    apples = ", which do not compare with one another" if len(kinds) > 1 else ""
    return apart, compared, f"Peak memory of the timing pass: {'; '.join(kinds) or 'not measured'}{apples}."


def _filled(lines: list[dict[str, str]], gap: str) -> pd.DataFrame:
    # The widest line names the columns: that of a failed run has only a few.
    columns = max((list(line) for line in lines), key=len)
    return pd.DataFrame([{column: line.get(column, gap) for column in columns} for line in lines])
