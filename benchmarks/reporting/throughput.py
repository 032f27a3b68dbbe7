"""The table of step times and memory, with the ratio to the step times of a reference."""

from __future__ import annotations

import pandas as pd

from benchmarks.reporting.render import Table
from benchmarks.reporting.views import (
    MEBIBYTE,
    NOT_AVAILABLE,
    count_runs,
    fill_gaps,
    find_label,
    name_protocol,
    pivot_costs,
    select_finished,
)

PHASES = ("train", "inference")

TOLERATED_SHARE = 0.05
"""What other processes may take of the processor during a timing pass without a mark."""

DISTURBED = "†"

# Column of the data -> metric of the long frame.
MEASURED = {
    **{
        f"{phase}_step_{quantile}_seconds": f"timing.{phase}_step.{quantile}"
        for phase in PHASES
        for quantile in ("median", "p10", "p90")
    },
    **{f"{phase}_tokens_per_second": f"timing.{phase}_tokens_per_second" for phase in PHASES},
    **{f"{phase}_over_bare": f"timing.{phase}_over_bare" for phase in PHASES},
    "peak_bytes": "memory.peak_bytes",
    "own_share": "timing.own_share",
    "others_share": "timing.others_share",
    "train_seconds": "timing.train_seconds",
}


def throughput_table(frame: pd.DataFrame, reference: str | None = None) -> Table:
    """Medians over the seeds of the timing pass."""
    runs = count_runs(frame)
    times = _take_medians(frame)
    base = None if reference is None else find_label(runs, reference)
    for phase in PHASES if base is not None else ():
        own = times[f"{phase}_over_bare"]
        times[f"{phase}_over_reference"] = own / own.get(base, float("nan"))
    timed = times.index
    shown = [label for label in runs.index if label in timed or not runs.loc[label, "finished"]]
    data = times.reindex(shown).rename_axis("method").reset_index()
    data["status"] = [runs.loc[label, "failure"] or "ok" for label in shown]
    lines = [
        {"method": label, **_format(times.loc[label], base)}
        if label in timed
        else {"method": label, "train step ms [p10-p90]": str(runs.loc[label, "failure"])}
        for label in shown
    ]
    untimed = [label for label in runs.index if label not in shown]
    return Table(
        "throughput",
        f"Throughput and memory ({name_protocol(frame)})",
        fill_gaps(lines or [{"method": "none timed"}]),
        data if shown else pd.DataFrame({"method": ["none timed"]}),
        (
            *_notes(frame),
            *_name_disturbed(times),
            *([f"Without a timing pass: {', '.join(untimed)}."] if untimed else []),
        ),
    )


def _take_medians(frame: pd.DataFrame) -> pd.DataFrame:
    """Of the timed runs, by label, in seconds and bytes; NaN where something was not measured."""
    costs = pivot_costs(frame).reindex(columns=list(MEASURED.values()))
    # Runs without a timing pass ran beside others: their training seconds do not compare with those of timed runs.
    by_label = costs[costs["timing.train_step.median"].notna()].groupby("label", sort=False)
    medians = by_label.median().set_axis(list(MEASURED), axis=1)
    # Of several seeds the most disturbed one: its times are among those shown.
    medians["others_share"] = by_label[MEASURED["others_share"]].max()
    return medians


def _format(times: pd.Series[float], base: str | None) -> dict[str, str]:
    def step(phase: str) -> str:
        middle, low, high = (1e3 * times[f"{phase}_step_{q}_seconds"] for q in ("median", "p10", "p90"))
        return NOT_AVAILABLE if pd.isna(middle) else f"{middle:.1f} [{low:.1f}-{high:.1f}]"

    def number(column: str, scale: float, digits: int) -> str:
        return NOT_AVAILABLE if pd.isna(times[column]) else f"{scale * times[column]:,.{digits}f}"

    cells = {
        "train step ms [p10-p90]": step("train") + (f" {DISTURBED}" if _is_disturbed(times) else ""),
        "train tokens/s": number("train_tokens_per_second", 1, 0),
        "inference ms [p10-p90]": step("inference"),
        "inference tokens/s": number("inference_tokens_per_second", 1, 0),
    }
    if base is not None:
        cells |= {f"{phase} time / {base}": number(f"{phase}_over_reference", 1, 2) for phase in PHASES}
    return cells | {
        "peak memory MiB": number("peak_bytes", 1 / MEBIBYTE, 0),
        "training s": number("train_seconds", 1, 1),
    }


def _is_disturbed(times: pd.Series[float]) -> bool:
    return bool(times["others_share"] > TOLERATED_SHARE)


def _name_disturbed(times: pd.DataFrame) -> list[str]:
    disturbed = times[times["others_share"] > TOLERATED_SHARE]["others_share"]
    if disturbed.empty:
        return []
    shares = ", ".join(f"{label} {100 * share:.0f} %" for label, share in disturbed.items())
    note = (
        f"{DISTURBED} During the timing pass other processes took processor time from this one's cores: {shares}. "
        "Read these times as rough."
    )
    return [note]


def _notes(frame: pd.DataFrame) -> tuple[str, ...]:
    peaks = select_finished(frame).query("metric == 'memory.peak_bytes'")
    kinds = [str(kind) for kind in peaks["note"].dropna().unique()]
    apart = (
        "Timing pass apart from training: batches of one shape without padding, warm-up excluded, device synchronised; "
        "median and percentiles of a run, medians over seeds. Training s: the optimiser steps of the run itself."
    )
    compared = (
        "Cells are timed minutes apart. Ratios are of steps in units of the bare model's forward, which took turns "
        "with them, so that they hold although a machine's speed drifts."
    )
    apples = ", which do not compare with one another" if len(kinds) > 1 else ""
    return apart, compared, f"Peak memory of the timing pass: {'; '.join(kinds) or 'not measured'}{apples}."
