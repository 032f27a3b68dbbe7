"""Rebuild every table and figure from records alone: ``python -m benchmarks.report --results results/quick``.

Equal records give equal bytes, so that a check can compare what is committed with what the records say.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import tyro

from benchmarks.plan.trials import trial_store
from benchmarks.records.schema import RunRecord
from benchmarks.records.store import RecordError, Store, replacing
from benchmarks.reporting.changes import difference_markdown
from benchmarks.reporting.comparable import Group, group_records
from benchmarks.reporting.comparison import comparison_table, equivalence_band
from benchmarks.reporting.figures.figures import draw_figures
from benchmarks.reporting.footnotes import group_caption, records_hash
from benchmarks.reporting.readme import ReadmeError, shown_folders, updated_readme
from benchmarks.reporting.render import Table, to_csv, to_latex, to_markdown
from benchmarks.reporting.scores import scores_table
from benchmarks.reporting.tables import InconsistentRecordsError, parameters_table, throughput_table
from benchmarks.reporting.tuning import draw_tuning, tuning_tables

RESULTS = Path("results")
COMMAND = "python -m benchmarks.report"
GENERATED = ("tables", "figures")
HEADER_BYTES = 2000  # enough to hold the line that says what wrote a file


class NoRecordsError(ValueError):
    """A folder holds no records to report on."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a results folder should hold, and the Markdown of its tables.

    Attributes:
        files: content by path relative to the results folder.
        markdown: all tables, as printed after a run.
    """

    files: dict[str, bytes]
    markdown: str


def build_report(root: Path, reference: str | None = None) -> Report:
    """Render the records under `root` without writing anything.

    Args:
        root: the results folder.
        reference: method that scores and step times are compared with; None takes the protocol's own, if it has one.
    """
    store = Store(root)
    records = _records(root)
    groups = group_records(records)
    content = records_hash([*records, *trial_store(root).all()])
    header = f"Written by `{_command(root, reference)}` from records with SHA-256 {content}"
    tables = {group.key: _tables(group, store, reference) for group in groups}
    files: dict[str, bytes] = {}
    for name in dict.fromkeys(table.name for group in groups for table in tables[group.key]):
        kind = [(group, table) for group in groups for table in tables[group.key] if table.name == name]
        files |= _table_files(name, kind, header)
    for group in groups:
        # Another matplotlib draws other bytes: what was drawn says with which one.
        drawn = f"{header}; drawn with matplotlib {mpl.__version__}"
        for name, svg in (draw_figures(group, drawn) | draw_tuning(group, store, drawn)).items():
            files[f"figures/{name if len(groups) == 1 else f'{name}-{group.key[:8]}'}.svg"] = svg
    parts = [f"## {_shown(root)}\n"]
    for group in groups:
        parts += [to_markdown(table) for table in tables[group.key]]
        parts.append("".join(f"- {line}\n" for line in group_caption(group)))
    return Report(files, "\n".join(parts))


def _records(root: Path) -> list[RunRecord]:
    records = Store(root).all()
    if not records:
        folder = Store(root).records_folder
        raise NoRecordsError(f"there are no records under {folder}; run `python -m benchmarks.run` first")
    return records


def write_report(root: Path, reference: str | None = None) -> str:
    """Write tables and figures of the records under `root`, and return the Markdown of the tables."""
    report = build_report(root, reference)
    write_files(root, report)
    return report.markdown


def write_files(root: Path, report: Report) -> None:
    """Bring the generated files under `root` to what `report` says; files that say so already are not touched."""
    for path in differing_files(root, report):
        content = report.files.get(path.relative_to(root).as_posix())
        if content is None:
            path.unlink(missing_ok=True)  # another run on this folder may have been faster
            continue
        with replacing(path) as file:
            file.write(content)


def differing_files(root: Path, report: Report) -> list[Path]:
    """Generated files under `root` that are missing, left from other records, or not what the records give."""
    changed = [
        root / name
        for name, content in report.files.items()
        if not (root / name).is_file() or (root / name).read_bytes() != content
    ]
    return sorted([*changed, *_stale(root, report)])


def check(root: Path, report: Report) -> tuple[list[Path], list[str]]:
    """What of a results folder is not as its records give it.

    Returns:
        The files that differ, and what could not be compared: figures that another matplotlib has drawn.
    """
    changed = differing_files(root, report)
    foreign: dict[Path, str] = {}
    for path in changed:
        version = _foreign_matplotlib(path, report.files.get(path.relative_to(root).as_posix(), b""))
        if version is not None:
            foreign[path] = version
    notes = [
        f"{root}: {list(foreign.values()).count(version)} figures were drawn with matplotlib {version}, "
        f"{mpl.__version__} is installed: only the tables were compared"
        for version in sorted(set(foreign.values()))
    ]
    return [path for path in changed if path not in foreign], notes


def _foreign_matplotlib(path: Path, expected: bytes) -> str | None:
    """The version that drew the figure at `path` from the records of `expected`, if it is not the installed one."""
    drawn = re.compile(rb"records with SHA-256 (\w+); drawn with matplotlib ([\w.+-]+)")
    there = drawn.search(path.read_bytes()[:HEADER_BYTES]) if path.is_file() else None
    wanted = drawn.search(expected[:HEADER_BYTES])
    if there is None or wanted is None or there[1] != wanted[1] or there[2] == wanted[2]:
        return None
    return there[2].decode()


def _tables(group: Group, store: Store, reference: str | None) -> list[Table]:
    name = reference or group.protocol.get("reference")
    tables = [scores_table(group)]
    if name is not None:
        compared = comparison_table(group, store.outcomes, name, equivalence_band(group))
        tables += [] if compared is None else [compared]
    return [*tables, parameters_table(group), throughput_table(group, name), *tuning_tables(group, store)]


def _table_files(name: str, kind: Sequence[tuple[Group, Table]], header: str) -> dict[str, bytes]:
    markdown = [f"<!-- {header} -->\n", *(to_markdown(table, group_caption(group)) for group, table in kind)]
    latex = [f"% {header}\n", *(to_latex(table, group_caption(group)) for group, table in kind)]
    csv = f"# {header}\n" + to_csv([(group.label, table) for group, table in kind])
    return {
        f"tables/{name}.md": "\n".join(markdown).encode(),
        f"tables/{name}.csv": csv.encode(),
        f"tables/{name}.tex": "\n".join(latex).encode(),
    }


def _stale(root: Path, report: Report) -> list[Path]:
    """Files of an earlier report that the records no longer give. Files of other origin are left alone."""
    present = [path for folder in GENERATED for path in sorted((root / folder).glob("*")) if path.is_file()]
    # What another run on this folder is about to rename is its own.
    extra = [p for p in present if p.relative_to(root).as_posix() not in report.files and p.suffix != ".tmp"]
    return [path for path in extra if COMMAND.encode() in path.read_bytes()[:HEADER_BYTES]]


def _shown(root: Path) -> str:
    """The folder as seen from the project, so that the bytes do not depend on where the report was started."""
    root = root.resolve()
    return f"{RESULTS}/{root.name}" if root.parent.name == RESULTS.name else root.name


def _command(root: Path, reference: str | None) -> str:
    return f"{COMMAND} --results {_shown(root)}" + ("" if reference is None else f" --reference {reference}")


@dataclass(frozen=True)
class Options:
    """Rebuild tables and figures from the records of one or more results folders."""

    results: tuple[Path, ...] = ()
    """Results folders; without any, every folder in results/ that has records."""
    readme: Path | None = None
    """Also rewrite the block between the results markers of this file; without --results, of the folders it shows."""
    check: bool = False
    """Write nothing; fail and name the files whose bytes are not what the records give."""
    reference: str | None = None
    """Method to compare with; by default the one that the protocol names, if any."""
    diff: Annotated[tuple[Path, Path] | None, tyro.conf.arg(metavar="A B")] = field(default=None)
    """Print how scores changed from one results folder to another, and do nothing else."""


def run(options: Options) -> int:
    """Do what the command line asks; returns the exit status."""
    if options.diff is not None:
        before, after = (_records(root) for root in options.diff)
        sys.stdout.write(f"From {options.diff[0]} to {options.diff[1]}\n\n{difference_markdown(before, after)}")
        return 0
    roots = options.results or tuple(sorted(path.parent for path in RESULTS.glob("*/records")))
    if not roots:
        raise NoRecordsError(f"no folder in {RESULTS}/ holds records; name one with --results")
    reports = {root: build_report(root, options.reference) for root in roots}
    readme = None
    if options.readme is not None:
        shown = reports if options.results else _shown_in(options.readme, reports)
        sections = [(root, report.markdown, report.files) for root, report in shown.items()]
        readme = updated_readme(options.readme, sections)
    if options.check:
        changed = []
        for root, report in reports.items():
            differing, notes = check(root, report)
            changed += differing
            sys.stderr.write("".join(f"{note}\n" for note in notes))
        if options.readme is not None and readme != options.readme.read_text(encoding="utf-8"):
            changed.append(options.readme)
        for path in changed:
            flag = f" --readme {path}" if path == options.readme else ""
            sys.stderr.write(f"{path} is not what the records give; write it with `{COMMAND}{flag}`\n")
        return 1 if changed else 0
    for root, report in reports.items():
        write_files(root, report)
        sys.stdout.write(report.markdown)
    if options.readme is not None and readme is not None:
        with replacing(options.readme) as file:
            file.write(readme.encode())
    return 0


def _shown_in(readme: Path, reports: dict[Path, Report]) -> dict[Path, Report]:
    """The reports whose folders the block of a README shows at present; all of them if it shows none."""
    names = shown_folders(readme)
    return {root: report for root, report in reports.items() if _shown(root) in names} or reports


def main() -> int:
    """Entry point."""
    options = tyro.cli(Options, prog=COMMAND)
    try:
        return run(options)
    except (NoRecordsError, RecordError, ReadmeError, InconsistentRecordsError) as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
