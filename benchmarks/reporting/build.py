"""From the records of one results folder to its tables and figures, and back: does the folder hold them?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.records.comparable import Group
from benchmarks.records.frame import Results
from benchmarks.records.store import replacing
from benchmarks.reporting.closing import tell_limits
from benchmarks.reporting.comparison import comparison_table
from benchmarks.reporting.endpoint import FIRST_METRIC, Endpoint
from benchmarks.reporting.figures.plan import plan_figures
from benchmarks.reporting.figures.style import use_style, write_svg
from benchmarks.reporting.footnotes import group_caption, records_hash
from benchmarks.reporting.parameters import parameters_table
from benchmarks.reporting.progress import progress_tables
from benchmarks.reporting.ranks import ranks_tables
from benchmarks.reporting.render import Table, to_csv, to_latex, to_markdown
from benchmarks.reporting.scores import scores_table
from benchmarks.reporting.skill import skill_tables
from benchmarks.reporting.swapped import swapped_tables
from benchmarks.reporting.throughput import throughput_table
from benchmarks.reporting.tuning import tuning_tables
from benchmarks.reporting.views import choose_reference
from benchmarks.statistics.intervals import EQUIVALENCE_BAND

RESULTS = Path("results")
COMMAND = "python -m benchmarks.report"
GENERATED = ("tables", "figures")
HEADER_BYTES = 2000
"""The line that says what wrote a file stands within so many bytes of its start."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a results folder should hold.

    Attributes:
        tables: bytes by path relative to the results folder.
        figures: what draws an SVG, by path relative to the results folder.
        markdown: all tables, as printed after a run: the comparison last.
        scores: the table of scores alone, per protocol.
        closing: what the tables can tell and cannot, a line per protocol.
    """

    tables: dict[str, bytes]
    figures: Mapping[str, Callable[[], bytes]]
    markdown: str
    scores: str
    closing: tuple[str, ...]


def build_report(root: Path, reference: str | None = None) -> Report:
    """Render the records under `root` without writing anything.

    Args:
        root: the results folder.
        reference: method that scores and step times are compared with; None takes the protocol's own or, where that
            one did not run, the first method that did.
    """
    results = Results.load(root)
    frame, groups = results.frame(), results.groups()
    content = records_hash([*results.records, *results.trials])
    header = f"Written by `{_command(root, reference)}` from records with SHA-256 {content}"
    frames = {group.key: frame[frame["protocol_id"] == group.key] for group in groups}
    by_group = [(group, _tables(group, frames[group.key], results, reference)) for group in groups]
    files: dict[str, bytes] = {}
    for name in dict.fromkeys(table.name for _, tables in by_group for table in tables):
        same_kind = [(group, table) for group, tables in by_group for table in tables if table.name == name]
        files |= _table_files(name, same_kind, header)
    figures = {
        f"figures/{name if len(groups) == 1 else f'{name}-{group.key[:8]}'}.svg": partial(_draw, drawing, header)
        for group in groups
        for name, drawing in plan_figures(frames[group.key], group).items()
    }
    parts = [f"## {name_folder(root)}\n"]
    closing = []
    for group, tables in by_group:
        compared = next((table for table in tables if table.name == "comparison"), None)
        parts += [to_markdown(table) for table in tables if table is not compared]
        parts.append("".join(f"- {line}\n" for line in group_caption(group)))
        parts += [] if compared is None else [to_markdown(compared)]
        closing.append(tell_limits(group, compared))
    scores = "\n".join(to_markdown(table) for _, tables in by_group for table in tables if table.name == "scores")
    return Report(files, figures, "\n".join(parts), scores, tuple(closing))


def make_tables(
    frame: pd.DataFrame,
    load_outcomes: Callable[[], pd.DataFrame],
    reference: str | None = None,
    band: float = EQUIVALENCE_BAND,
    endpoint: Endpoint = FIRST_METRIC,
) -> list[Table]:
    """Every table of one protocol.

    Args:
        frame: the long frame of that protocol.
        load_outcomes: gives the predictions of its runs; not called where nothing is compared.
        reference: method that scores and step times are compared with.
        band: differences that count as none, as a share.
        endpoint: what is compared.
    """
    tables = [scores_table(frame), *skill_tables(frame, endpoint)]
    if reference is not None:
        compared = comparison_table(frame, load_outcomes(), reference, band, endpoint)
        tables += [] if compared is None else [compared]
    costs = [parameters_table(frame), throughput_table(frame, reference)]
    return [
        *tables,
        *ranks_tables(frame),
        *progress_tables(frame, reference, endpoint),
        *swapped_tables(frame),
        *costs,
        *tuning_tables(frame, endpoint),
    ]


def write_report(root: Path, reference: str | None = None) -> Report:
    """Write tables and figures of the records under `root`."""
    report = build_report(root, reference)
    write_files(root, report)
    return report


def write_files(root: Path, report: Report) -> None:
    """Bring the generated files under `root` to what `report` says; files that say so already are not touched."""
    drawn = {name: draw() for name, draw in report.figures.items()}
    for name, content in {**report.tables, **drawn}.items():
        path = root / name
        if path.is_file() and path.read_bytes() == content:
            continue
        with replacing(path) as file:
            file.write(content)
    for path in _find_stale(root, report):
        path.unlink(missing_ok=True)  # another run on this folder may have been faster


def find_differences(root: Path, report: Report) -> list[Path]:
    """Tables that are not what the records give, figures that are missing, and files left from other records.

    Figures are not compared: their bytes depend on the versions of matplotlib and of the fonts.
    """
    tables = [root / name for name, content in report.tables.items() if _read(root / name) != content]
    figures = [root / name for name in report.figures if not (root / name).is_file()]
    return sorted([*tables, *figures, *_find_stale(root, report)])


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _draw(drawing: Callable[[], Figure], header: str) -> bytes:
    with use_style():
        return write_svg(drawing(), header)


def _tables(group: Group, frame: pd.DataFrame, results: Results, reference: str | None) -> list[Table]:
    name, band = reference or choose_reference(frame, group.protocol.reference), group.protocol.equivalence_band / 100
    endpoint = Endpoint.of(group.protocol, results)
    return make_tables(frame, lambda: results.outcomes(group.key), name, band, endpoint)


def _table_files(name: str, same_kind: Sequence[tuple[Group, Table]], header: str) -> dict[str, bytes]:
    markdown = [f"<!-- {header} -->\n", *(to_markdown(table, group_caption(group)) for group, table in same_kind)]
    latex = [f"% {header}\n", *(to_latex(table, group_caption(group)) for group, table in same_kind)]
    csv = f"# {header}\n" + to_csv([(group.label, table) for group, table in same_kind])
    return {
        f"tables/{name}.md": "\n".join(markdown).encode(),
        f"tables/{name}.csv": csv.encode(),
        f"tables/{name}.tex": "\n".join(latex).encode(),
    }


def _find_stale(root: Path, report: Report) -> list[Path]:
    """Files of an earlier report that the records no longer give. Files of other origin are left alone."""
    present = [path for folder in GENERATED for path in sorted((root / folder).glob("*")) if path.is_file()]
    wanted = {*report.tables, *report.figures}
    # A temporary file belongs to another run, which is about to rename it.
    extra = [path for path in present if path.relative_to(root).as_posix() not in wanted and path.suffix != ".tmp"]
    return [path for path in extra if COMMAND.encode() in path.read_bytes()[:HEADER_BYTES]]


def name_folder(root: Path) -> str:
    """The folder as seen from the project, so that the bytes do not depend on where the report was started."""
    root = root.resolve()
    return f"{RESULTS}/{root.name}" if root.parent.name == RESULTS.name else root.name


def _command(root: Path, reference: str | None) -> str:
    return f"{COMMAND} --results {name_folder(root)}" + ("" if reference is None else f" --reference {reference}")
