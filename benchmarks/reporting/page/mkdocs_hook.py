"""Puts the results into the documentation's site: the page under ``results/``, findings into every method's page."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.reporting.page.findings import find_about
from benchmarks.reporting.page.write import write_page

ROOT = Path(__file__).resolve().parents[3]


def on_files(files: Any, config: Any) -> Any:
    """Add the page's files to those that mkdocs copies."""
    from mkdocs.structure.files import File

    with tempfile.TemporaryDirectory() as folder:
        page = write_page(ROOT / "results", Path(folder)).parent
        for path in sorted(page.rglob("*")):
            if path.is_file():
                uri = f"results/{path.relative_to(page).as_posix()}"
                files.append(File.generated(config, uri, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Add what the runs found to the page of a method."""
    folder, _, name = page.file.src_uri.rpartition("/")
    method = name.removesuffix(".md")
    if folder != "methods" or method == "index":
        return markdown
    return f"{markdown}\n\n{find_about(method, ROOT / 'results')}"
