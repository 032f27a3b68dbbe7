"""README is short, and its commands that need no training run to their end."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
LINES = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"^```console\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
UNTRAINED = [line for line in LINES if "benchmarks.report --results" in line or "benchmarks.claims" in line]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*may be new.*")  # parameters are counted, nothing is trained
@pytest.mark.parametrize("line", UNTRAINED)
def test_a_command_without_training_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, module, *words = shlex.split(line)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("page"))
    (tmp_path / "results/tables/claims.md").unlink()
    shutil.rmtree(tmp_path / "results/glue/tables")
    monkeypatch.setattr("sys.argv", [module, *words])
    assert importlib.import_module(module).main() in (0, None)
    written = "tables/claims.md" if module == "benchmarks.claims" else "glue/tables/scores.md"
    assert (tmp_path / "results" / written).read_text() == (ROOT / "results" / written).read_text()


def test_readme_is_short_and_its_commands_are_known() -> None:
    assert len(README.encode()) <= 10_000
    assert len(UNTRAINED) == 2
    others = [line for line in LINES if not line.startswith("python -m benchmarks.")]
    assert others == ["make quick", "make test"]


# The same lines with less of everything; later flags win over earlier ones.
SMALL = {
    "benchmarks.run": "--backbone tiny-bert --steps 1 --batch-size 4 --eval-rows 4 --seeds 0 --tune none --tasks",
    "mechanisms": "--steps 1 --seeds 0 --tasks conflict --jobs 1",
    "benchmarks.report": "",
    "benchmarks.speed": "--layers 1 --rows 2 --length 4 --inference-rows 1 --warmup 0 --repeats 1",
}


def _write_rows(folder: Path) -> None:
    """Rows in the columns of four tasks; more than a test split is filled to."""
    for task, columns in {"cola": 1, "rte": 2, "mrpc": 2, "stsb": 2}.items():
        (folder / task).mkdir(parents=True)
        names = ["sentence"] if columns == 1 else ["sentence1", "sentence2"]
        for split, rows in (("train", 1400), ("validation", 40)):
            texts = {name: [f"{split} {name} {row}" for row in range(rows)] for name in names}
            frame = pd.DataFrame({**texts, "label": [row % 2 for row in range(rows)]})
            frame["label"] = frame["label"].astype("float32" if task == "stsb" else "int64")
            frame.to_parquet(folder / task / f"{split}.parquet")


@pytest.mark.slow
@pytest.mark.exhaustive  # four minutes; CI parses these lines and runs the same modules on less
@pytest.mark.filterwarnings("ignore")  # what libraries say of models this small
@pytest.mark.parametrize("line", [line for line in LINES if "-m benchmarks." in line and line not in UNTRAINED])
def test_every_other_command_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own that has the committed results and generated rows in the place of GLUE's."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("page"))
    (tmp_path / "docs").mkdir()
    if "DATA" in line:
        _write_rows(tmp_path / "DATA" / "glue")
    _, _, module, *words = shlex.split(line)
    small = SMALL["mechanisms" if "mechanisms" in words else module]
    small += (" rte,cola" if "DATA" in words else " q_rte,q_sst2") if small.endswith("--tasks") else ""
    monkeypatch.setattr("sys.argv", [module, *words, *shlex.split(small)])
    assert importlib.import_module(f"{module}.__main__" if module == "benchmarks.speed" else module).main() in (0, None)
