"""What the committed runs found about one method: a section of its page, made when the site is built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from benchmarks.reporting.page.data import read_tables
from benchmarks.reporting.render import Table, to_markdown


def find_about(method: str, results: Path) -> str:
    """Scores, comparison and costs of a method in every results folder, then its decided pairs of the mechanisms.

    Args:
        method: its name; presets are rows of their own.
        results: folder of the results folders, whose tables are read.

    Returns:
        Markdown from the heading on; the one sentence that no run has the method, where none has.
    """
    rows = [row for folder in sorted(results.glob("*/tables")) for row in _suite_rows(method, folder)]
    parts = ["## What our runs found\n"]
    if rows:
        text = pd.DataFrame(rows)
        notes = ("Read from the tables of the committed records. Scores times 100, with 95 % intervals over seeds.",)
        parts.append(to_markdown(Table("found", "In the suites", text, text, notes)))
    mechanisms = list(_mechanisms(method, results / "mechanisms" / "tables"))
    if mechanisms:
        parts.append("### On tasks with a known truth\n")
        parts.append("".join(f"- {line}\n" for line in mechanisms))
    if len(parts) == 1:
        parts.append(
            f"No committed run has {method} yet: `python -m benchmarks.run --methods lora,{method}` makes one.\n"
        )
    return "\n".join(parts)


def _suite_rows(method: str, tables: Path) -> Iterator[dict[str, str]]:
    files = {name: tables / f"{name}.csv" for name in ("scores", "comparison", "parameters", "throughput")}
    if not files["scores"].is_file():
        return
    frames = {name: pd.read_csv(path, comment="#") for name, path in files.items() if path.is_file()}
    scores = frames["scores"]
    means = scores[scores["metric"] == "mean"]
    for _, mean in means[means["method"].map(lambda label: str(label).partition("@")[0] == method)].iterrows():
        where = (mean["protocol"], mean["method"])
        compared, size, speed = (_find(frames.get(name), where) for name in ("comparison", "parameters", "throughput"))
        yield {
            "results": tables.parent.name,
            "method": str(mean["method"]),
            "mean score": f"{100 * mean['mean']:.1f} ± {100 * mean['half_width']:.1f} ({mean['task']})",
            "minus the reference": "n/a"
            if compared is None
            else f"{100 * compared['difference']:+z.1f} ± {100 * compared['half_width']:.1f}: {compared['verdict']}",
            "parameters": "n/a" if size is None else f"{int(size['adapter']):,}",
            "step / bare forward": "n/a" if speed is None else f"{speed['train_over_bare']:.2f}",
        }


def _find(frame: pd.DataFrame | None, where: tuple[str, str]) -> pd.Series | None:
    """The row of a method under a protocol; None where the table has none."""
    if frame is None:
        return None
    found = frame[(frame["protocol"] == where[0]) & (frame["method"] == where[1])]
    return None if found.empty else found.iloc[0]


def _mechanisms(method: str, tables: Path) -> Iterator[str]:
    """One line per experiment: over whom the method is decided to be better, and who over it."""
    for path in sorted(tables.glob("*-pairs.md")):
        for table in read_tables(path):
            pairs = pd.DataFrame(table["rows"], columns=table["columns"])
            pairs = pairs[pairs["verdict"] == "decided"]
            above = [f"{row['worse']} by {row['difference']}" for _, row in pairs[pairs["better"] == method].iterrows()]
            below = [f"{row['better']} by {row['difference']}" for _, row in pairs[pairs["worse"] == method].iterrows()]
            said = [f"{word} {', '.join(names)}" for word, names in (("above", above), ("below", below)) if names]
            if said:
                yield f"{path.stem.removesuffix('-pairs')}: {'; '.join(said)} (mean R2, p below 0.05 after Holm)."
