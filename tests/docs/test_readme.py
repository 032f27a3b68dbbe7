"""README is short, and its commands that need no training run to their end."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
LINES = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"^```console\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
# Those that train or time are parsed by `test_documents`, and run by the tests of their modules on smaller models.
UNTRAINED = [line for line in LINES if "benchmarks.report --results" in line or "benchmarks.claims" in line]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*may be new.*")  # parameters are counted, nothing is trained
@pytest.mark.parametrize("line", UNTRAINED)
def test_a_command_without_training_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, module, *words = shlex.split(line)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("page"))
    (tmp_path / "results/tables/claims.md").unlink()
    shutil.rmtree(tmp_path / "results/glue-8-tasks/tables")
    monkeypatch.setattr("sys.argv", [module, *words])
    assert importlib.import_module(module).main() in (0, None)
    written = "tables/claims.md" if module == "benchmarks.claims" else "glue-8-tasks/tables/scores.md"
    assert (tmp_path / "results" / written).read_text() == (ROOT / "results" / written).read_text()


def test_readme_is_short_and_its_commands_are_known() -> None:
    assert len(README.encode()) <= 10_000
    assert len(UNTRAINED) == 2
    others = [line for line in LINES if not line.startswith("python -m benchmarks.")]
    assert others == ["make quick", "make test"]
