"""Rebuild every table and figure from records alone: ``python -m benchmarks.report --results results/quick``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.mechanisms.build import build_mechanisms, has_archive
from benchmarks.records.frame import NoRecordsError, Results
from benchmarks.records.store import RecordError, replacing
from benchmarks.records.tracked import own_folders
from benchmarks.reporting.build import (
    COMMAND,
    RESULTS,
    Report,
    build_report,
    find_differences,
    write_files,
)
from benchmarks.reporting.changes import difference_markdown
from benchmarks.reporting.page.write import write_page
from benchmarks.reporting.parameters import InconsistentRecordsError
from benchmarks.reporting.readme import VERDICT as VERDICT_BLOCK
from benchmarks.reporting.readme import ReadmeError, find_folder, update_readme, update_verdict
from benchmarks.verdict.evidence import Evidence
from benchmarks.verdict.page import PAGE as VERDICT
from benchmarks.verdict.page import describe_answers, summarise, write_verdict
from benchmarks.verdict.questions import answer_all

PAGE = RESULTS / "page"


@dataclass(frozen=True)
class Options:
    """Rebuild tables and figures from the records of one or more results folders."""

    results: tuple[Path, ...] = ()
    """Results folders; without any, every folder in results/ that has records."""
    readme: Path | None = None
    """Also rewrite the block between the results markers of this file: the scores of the folder that they name."""
    verdict: bool = False
    """Also write docs/verdict.md: what all folders of results/ that git knows say to the questions that people ask."""
    check: bool = False
    """Write nothing; fail and name the tables that are not what the records give, and the figures that are missing."""
    html: bool = False
    """Also write results/page: one folder with everything, for a browser, from disk or from a server."""
    reference: str | None = None
    """Method to compare with; by default the one that the protocol names, if any."""
    diff: Annotated[tuple[Path, Path] | None, tyro.conf.arg(metavar="A B")] = field(default=None)
    """Print how scores changed from one results folder to another, and do nothing else."""


def run(options: Options) -> int:
    """Do what the command line asks; returns the exit status."""
    if options.diff is not None:
        before, after = (Results.load(root) for root in options.diff)
        sys.stdout.write(f"From {options.diff[0]} to {options.diff[1]}\n\n{difference_markdown(before, after)}")
        return 0
    roots = options.results or find_folders(RESULTS)
    if not roots:
        raise NoRecordsError(f"no folder in {RESULTS}/ holds records; name one with --results")
    reports = {root: _build(root, options.reference) for root in roots}
    committed = Evidence(RESULTS, own_folders(RESULTS))
    pages = {}
    if options.readme is not None:
        pages[options.readme] = _update(options.readme, reports, options.reference, committed)
    if options.verdict:
        pages[VERDICT] = write_verdict(committed)
        for name in sorted(committed.without):
            sys.stderr.write(
                f"{VERDICT} leaves {RESULTS / name} out, which git does not know: git add it to have it in\n"
            )
    if options.check:
        return _check(reports, pages)
    _write(reports, pages)
    if options.html:
        sys.stdout.write(f"{write_page(RESULTS, PAGE, describe_answers(RESULTS))}\n")
    return 0


def find_folders(results: Path) -> tuple[Path, ...]:
    """The folders below `results` that hold records of suites or runs of the mechanisms."""
    return tuple(sorted(path for path in results.glob("*") if (path / "records").is_dir() or has_archive(path)))


def _build(root: Path, reference: str | None) -> Report:
    return build_mechanisms(root) if has_archive(root) else build_report(root, reference)


def _update(path: Path, reports: dict[Path, Report], reference: str | None, committed: Evidence) -> str:
    shown = find_folder(path)
    known = {root.resolve(): report for root, report in reports.items()}
    report = known.get(shown.resolve()) or build_report(shown, reference)
    text = update_readme(path, report.scores)
    return update_verdict(text, summarise(answer_all(committed))) if VERDICT_BLOCK.search(text) else text


def _check(reports: dict[Path, Report], pages: dict[Path, str]) -> int:
    differing = [path for root, report in reports.items() for path in find_differences(root, report)]
    differing += [path for path, text in pages.items() if not path.is_file() or path.read_text("utf-8") != text]
    for file in differing:
        flag = "" if file not in pages else " --verdict" if file == VERDICT else f" --readme {file}"
        sys.stderr.write(f"{file} is not what the records give; write it with `{COMMAND}{flag}`\n")
    return 1 if differing else 0


def _write(reports: dict[Path, Report], pages: dict[Path, str]) -> None:
    for root, report in reports.items():
        write_files(root, report)
        sys.stdout.write(report.markdown)
    for path, text in pages.items():
        with replacing(path) as file:
            file.write(text.encode())


def main() -> int:
    """Entry point."""
    options = tyro.cli(Options, prog=COMMAND)
    try:
        return run(options)
    except (RecordError, ReadmeError, InconsistentRecordsError) as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
