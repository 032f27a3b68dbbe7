"""The shape of the house: small files, short functions, commands over packages, imports that only go down."""

from __future__ import annotations

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("moepeft", "benchmarks")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


# ---------------------------------------------------------------------- sizes


def test_the_top_of_benchmarks_is_its_commands() -> None:
    found = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert found == {"__init__.py", "run.py", "report.py", "claims.py"}


def test_files_are_small() -> None:
    sizes = {path.relative_to(ROOT).as_posix(): lines(path) for path in FILES}
    assert {name: size for name, size in sizes.items() if size > 320} == {}
    assert statistics.median(size for size in sizes.values() if size > 1) <= 150  # one line: an empty __init__.py


def test_functions_are_short() -> None:
    sizes = [
        node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]
    assert statistics.quantiles(sizes, n=10)[-1] <= 35


# ---------------------------------------------------------------------- imports


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages and their contracts, to be spoilt."""
    folder = tmp_path_factory.mktemp("house")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def check_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "300", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_contracts_are_kept(copy: Path) -> None:
    done = check_imports(copy)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("benchmarks/reporting/scores.py", "import torch", "benchmarks.reporting"),
        ("benchmarks/reporting/scores.py", "import benchmarks.families.base", "benchmarks.reporting"),
        ("benchmarks/records/store.py", "import torch.nn", "benchmarks.reporting"),  # indirectly
        ("benchmarks/backbones/load.py", "import benchmarks.cells.train", "benchmarks: strictly downwards"),
        ("benchmarks/instruments/memory.py", "import benchmarks.speed.rows", "benchmarks: strictly downwards"),
        ("benchmarks/plan/cells.py", "from moepeft.methods import ept", "benchmarks: no method by name"),
        ("benchmarks/tasks/base.py", "import benchmarks.tasks.loading", "moepeft and benchmarks: no circle"),
        ("moepeft/errors.py", "import moepeft.registry", "moepeft and benchmarks: no circle"),
        ("moepeft/errors.py", "import benchmarks.tasks.base", "moepeft: nothing of benchmarks"),
    ],
)
def test_a_wrong_import_breaks_its_contract(copy: Path, module: str, line: str, contract: str) -> None:
    path = copy / module
    text = path.read_text()
    path.write_text(f"{text}\n\ndef spoilt() -> None:\n    {line}\n")
    try:
        done = check_imports(copy)
    finally:
        path.write_text(text)
    assert done.returncode == 1
    assert re.search(rf"^{re.escape(contract)}.* BROKEN", done.stdout, flags=re.MULTILINE), done.stdout + done.stderr
