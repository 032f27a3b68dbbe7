"""What README and CONTRIBUTING show runs as it stands there."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import moepeft
from moepeft import registry

ROOT = Path(__file__).resolve().parents[2]


def python_blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = python_blocks("README.md")
    assert len([line for line in example.splitlines() if line.strip()]) <= 22
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert (tmp_path / "ept-adapters" / "adapter.safetensors").is_file()
    assert scope["tokens"].shape == (6, 6)
    assert scope["adapters"].merged


@pytest.fixture
def seventh(monkeypatch: pytest.MonkeyPatch) -> str:
    """CONTRIBUTING's method, registered from outside through an entry point."""
    (source,) = python_blocks("CONTRIBUTING.md")
    module = types.ModuleType("outside")
    monkeypatch.setitem(sys.modules, "outside", module)
    exec(compile(source, "CONTRIBUTING.md", "exec"), module.__dict__)
    point = importlib.metadata.EntryPoint("scaled", "outside:Scaled", registry.ENTRY_POINT_GROUP)
    found = importlib.metadata.EntryPoints([point])
    monkeypatch.setattr(registry, "entry_points", found.select)
    return "scaled"


def test_a_seventh_method_takes_one_file(seventh: str, tmp_path: Path) -> None:
    assert seventh in moepeft.available()
    assert seventh not in registry.METHODS
    factory = moepeft.method(seventh, num_tasks=3, start=0.5)
    assert dataclasses.asdict(factory) == {"start": 0.5}
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    bare = model(x)
    adapters = moepeft.attach(model, factory)
    assert torch.allclose(model(x), 1.5 * bare)
    assert adapters.parameter_count().total == adapters.parameter_count().closed_form == 3
    adapters.save(tmp_path)
    adapters.detach()
    moepeft.load(model, tmp_path)
    assert torch.allclose(model(x), 1.5 * bare)


def test_import_needs_no_benchmark_extra() -> None:
    """The library imports where only its core dependencies are installed."""
    extras = ("datasets", "evaluate", "pandas", "pydantic", "tyro", "sklearn", "matplotlib", "peft", "rich", "tabulate")
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in extras)
    code = f"import sys\n{blocked}\nimport moepeft\nfor name in moepeft.available(): moepeft.method(name)"
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True, cwd=ROOT)


def test_no_method_is_known_to_the_benchmarks() -> None:
    """The runner speaks to the protocol only: the code of `benchmarks/` names no method."""
    names = "|".join(registry.METHODS)
    word = re.compile(rf"(?<![A-Za-z])({names})(?![A-Za-z])", re.IGNORECASE)
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    assert len(files) > 10
    found = []
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if match := word.search(line):
                # "more" is also an English word: as a method's name it is quoted or part of a list of methods.
                if match[1].lower() == "more" and not re.search(r"[\"'`,]more[\"'`,@]|MoRE", line):
                    continue
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
