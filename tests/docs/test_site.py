"""The documentation's site: built without a warning, opened from disk in a real browser, without a network."""

from __future__ import annotations

import dataclasses
import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from moepeft import registry
from moepeft.registry import factory_class

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium")

pytestmark = pytest.mark.slow
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("name", registry.METHODS)
def test_a_method_s_page_shows_every_hyper_parameter(site: Path, name: str) -> None:
    page = (site / "methods" / f"{name}.html").read_text()
    for field in dataclasses.fields(factory_class(name)):  # type: ignore[arg-type]
        assert re.search(rf"<td>\s*<code>(<span[^>]*>)?{field.name}\b", page), field.name


def test_a_method_s_page_shows_what_the_runs_found(site: Path) -> None:
    """The numbers of the committed tables, not others."""
    scores = pd.read_csv(ROOT / "results/glue/tables/scores.csv", comment="#")
    (mean,) = scores[(scores["method"] == "ept") & (scores["metric"] == "mean")]["mean"]
    page = (site / "methods" / "ept.html").read_text()
    assert f"{100 * mean:.1f} ±" in page.partition('id="what-our-runs-found"')[2]
    assert 'id="what-our-runs-found"' not in (site / "methods" / "index.html").read_text()


def test_no_page_asks_a_network_for_anything(site: Path) -> None:
    loading = re.compile(
        r"<(?:script|img|iframe|source)[^>]+src=\"(?:https?:)?//|<link[^>]+rel=\"stylesheet\"[^>]+href=\"(?:https?:)?//"
    )
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 10
    assert {page.name: loading.findall(page.read_text()) for page in pages if loading.search(page.read_text())} == {}


@in_a_browser
def test_formulas_are_rendered(site: Path, tmp_path: Path) -> None:
    page = site / "methods" / "ept.html"
    written = len(re.findall(r"class=\"arithmatex\"", page.read_text()))
    assert written > 5
    document, _ = browse(page, tmp_path)
    assert document.count('class="katex-html"') == written
    assert "katex-error" not in document


@in_a_browser
def test_a_page_opened_from_disk_has_no_error_in_the_console(site: Path, tmp_path: Path) -> None:
    _, console = browse(site / "index.html", tmp_path)
    assert [line for line in console.splitlines() if ":CONSOLE" in line and "error" in line.lower()] == []


def browse(page: Path, profile: Path) -> tuple[str, str]:
    """The document after its scripts have run, and what the browser logged."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile / 'browser'}",
        "--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return html.unescape(done.stdout), done.stderr
