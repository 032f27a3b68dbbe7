"""Write the results page: a folder that opens from disk and can be served as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records.store import replacing
from benchmarks.reporting.page.data import gather_records, gather_suites, gather_tables

ASSETS = Path(__file__).parent / "assets"


def write_page(results: Path, target: Path, answers: Sequence[dict[str, Any]] = ()) -> Path:
    """Write the page of one results folder, or of all those below `results`.

    Args:
        results: has records, or holds a folder per suite, and ``mechanisms``, ``speed`` and ``tables`` if they exist.
        target: folder of the page; what stands there of an earlier page is replaced.
        answers: to what people ask (`benchmarks.verdict`); without any, the verdict is what each table decides.

    Returns:
        The page's file.

    Raises:
        RecordError: a record is damaged.
    """
    own = results / "records"
    folders = [results] if own.is_dir() else sorted(path.parent for path in results.glob("*/records"))
    page = {
        "suites": gather_suites(folders),
        "records": gather_records(folders),
        "mechanisms": _with_figures(results / "mechanisms", target),
        "speed": [table for folder in sorted(results.glob("speed*/tables")) for table in gather_tables(folder)],
        "claims": gather_tables(results / "tables"),
    }
    page["answers"] = list(answers)
    page["verdict"] = [] if answers else state_verdict(page)
    page["conflict"] = answer_conflict(page)
    shutil.copytree(ASSETS, target, dirs_exist_ok=True)
    (target / "page.html").replace(target / "index.html")
    # A script and not JSON: a page that was opened from disk may not fetch files.
    with replacing(target / "data.js") as file:
        file.write(f"window.PAGE = {json.dumps(page, separators=(',', ':'))};\n".encode())
    return target / "index.html"


def _with_figures(folder: Path, target: Path) -> list[dict[str, Any]]:
    tables = [dict(table) for table in gather_tables(folder / "tables")]
    for table in tables:
        name = f"{Path(table['file']).stem.removesuffix('-scores')}.svg"
        if table["file"].endswith("-scores.md") and (folder / "figures" / name).is_file():
            (target / "figures").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / "figures" / name, target / "figures" / name)
            table["figure"] = f"figures/{name}"
    return tables


def state_verdict(page: dict[str, Any]) -> list[dict[str, str]]:
    """What the tables decide, one entry per suite and experiment; nothing that a record does not say."""
    found = [_of_suite(suite) for suite in page["suites"] if suite["pairs"]]
    experiments = [table for table in page["mechanisms"] if table["file"].endswith("-pairs.md") and table["notes"]]
    return found + [
        {"question": f"{table['title']}:", "answer": table["notes"][0], "link": "#mechanisms"} for table in experiments
    ]


def answer_conflict(page: dict[str, Any]) -> str:
    """Which method tasks that contradict each other ask for, as the experiment's own tables say."""
    found = {Path(table["file"]).stem: table for table in page["mechanisms"]}
    if "conflict-scores" not in found:
        return "Not run yet: python -m benchmarks.run --suite mechanisms"
    scores, pairs = found["conflict-scores"], found.get("conflict-pairs", {"rows": []})
    best = next((row[0] for row in scores["rows"] if row[0] != scores["rows"][0][0]), "no method")
    beaten = [row[1] for row in pairs["rows"] if row[0] == best and row[-1] == "decided"]
    said = f", decided over {', '.join(beaten)}" if beaten else ", decided over no other method"
    return f"{best} has the highest mean R2{said}."


def _of_suite(suite: dict[str, Any]) -> dict[str, str]:
    decided = [pair for pair in suite["pairs"] if pair["decided"]]
    sentences = [
        f"{pair['first'] if pair['difference'] > 0 else pair['second']} is above "
        f"{pair['second'] if pair['difference'] > 0 else pair['first']} by {abs(pair['difference']):.1f} points "
        f"(± {pair['half']:.1f})"
        for pair in decided
    ]
    answer = f"{len(decided)} of {len(suite['pairs'])} pairs are decided after {suite['steps']} steps"
    answer += f": {'; '.join(sentences)}." if sentences else ": no two methods are told apart at this budget."
    return {"question": f"{suite['name']}:", "answer": answer, "link": "#pairs", "suite": suite["key"]}
