"""Puts the results into the documentation's site: the page under ``results/``, findings into every method's page."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.reporting.page.findings import find_about
from benchmarks.reporting.page.write import write_page
from benchmarks.verdict.page import describe_answers, section_of

VERDICT = "verdict.md"
ROOT = Path(__file__).resolve().parents[2]


def on_files(files: Any, config: Any) -> Any:
    """Add the page's files to those that mkdocs copies."""
    from mkdocs.structure.files import File

    if not (ROOT / "results").is_dir():
        raise FileNotFoundError(f"the site shows the results of {ROOT / 'results'}, which is no folder")
    with tempfile.TemporaryDirectory() as folder:
        page = write_page(ROOT / "results", Path(folder), describe_answers(ROOT / "results")).parent
        for path in sorted(page.rglob("*")):
            if path.is_file():
                uri = f"results/{path.relative_to(page).as_posix()}"
                files.append(File.generated(config, uri, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Add what the runs found to the page of a method; lead the verdict's evidence to the page of results."""
    if page.file.src_uri == VERDICT:
        # In the repository the evidence is a table's file; the site has the same tables on one page.
        return re.sub(
            r"\(\.\./results/(\w+)[^)]*\)", lambda found: f"(results/index.html{section_of(found[1])})", markdown
        )
    folder, _, name = page.file.src_uri.rpartition("/")
    method = name.removesuffix(".md")
    if folder != "methods" or method == "index":
        return markdown
    return f"{markdown}\n\n{find_about(method, ROOT / 'results')}"
