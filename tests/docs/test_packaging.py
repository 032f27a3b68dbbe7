"""What is built is what is needed: archives with all their files, a wheel that imports alone and at once."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git tells which files belong to an archive"),
]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, and the wheel that is built from it."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def source_files(archives: tuple[Path, Path]) -> set[str]:
    with tarfile.open(archives[0]) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    return {name for name in names if name}


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone, in a folder."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*command, str(archives[1])], check=True)
    return folder


def here(*folders: str) -> set[str]:
    """The folders' files but for those that git ignores, such as the page of a run of one's own."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name for name in names if (ROOT / name).is_file() and not any(p.startswith(".") for p in Path(name).parts)}


@pytest.mark.parametrize("folder", ["moepeft", "benchmarks", "tests", "examples", "results", "docs"])
def test_the_source_archive_is_complete(folder: str, source_files: set[str]) -> None:
    wanted = here(folder)
    assert wanted
    assert not wanted - source_files
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in source_files)


def test_the_source_archive_has_what_tests_and_benchmarks_read(source_files: set[str]) -> None:
    assert "moepeft/py.typed" in source_files
    assert {"benchmarks/protocols/quick.toml", "benchmarks/published.toml"} <= source_files
    single = {"pyproject.toml", "README.md", "LICENSE", "Makefile", "mkdocs.yml", "constraints.txt"}
    assert single | {path.name for path in ROOT.glob("*.md")} <= source_files
    for name in ("constraints-lowest.txt", "CHANGELOG.md"):
        assert name in source_files


def test_the_wheel_has_the_library_and_nothing_else(archives: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(archives[1]).namelist())
    metadata = f"moepeft-{PROJECT['version']}.dist-info/"
    assert {name for name in names if not name.startswith(metadata)} == here("moepeft")
    assert "moepeft/py.typed" in names
    assert f"{metadata}licenses/LICENSE" in names


def run(code: str, installed: Path, cwd: Path) -> str:
    preamble = f"import sys\nsys.path.insert(0, {str(installed)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", preamble + textwrap.dedent(code)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_wheel_works_without_extras(installed: Path, tmp_path: Path) -> None:
    """Every package of an extra is out of reach; so is the checkout, which a benchmark would come from."""
    out = run(
        """
        OUT_OF_REACH = {"pandas", "datasets", "evaluate", "matplotlib", "tyro", "pydantic", "rich", "sklearn",
                        "tabulate", "pyarrow", "peft", "beartype", "hypothesis", "pytest", "benchmarks", "tests"}
        class Without:
            # A finder that does not find these, as if they were not installed.
            def __init__(self, finder):
                self.finder = finder
            def find_spec(self, name, path=None, target=None):
                return None if name.partition(".")[0] in OUT_OF_REACH else self.finder.find_spec(name, path, target)
            def __getattr__(self, name):
                return getattr(self.finder, name)
        sys.meta_path[:] = map(Without, sys.meta_path)
        import moepeft, torch
        print(moepeft.__file__)
        for name in moepeft.available():
            model = torch.nn.ModuleDict({"fc1": torch.nn.Linear(16, 32), "fc2": torch.nn.Linear(32, 16)})
            adapters = moepeft.attach(model, moepeft.method(name, num_tasks=2))
            adapters.save(name)
            adapters.detach()
            moepeft.load(model, name)
        import moepeft.bridges.peft_checkpoints
        try:
            import pandas
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError("pandas was found: nothing was out of reach")
        """,
        installed,
        tmp_path,
    )
    assert Path(out).is_relative_to(installed)


BROKEN = {
    # what the documentation's method is made to do wrong -> what the one line must name
    "wrong count": (
        ("sum(site.out_features for site in sites)", "1 + sum(site.out_features for site in sites)"),
        "count",
    ),
    "a lost gradient": (("y * self.factor.to(y.dtype)", "y * self.factor.detach().to(y.dtype)"), "'factor'"),
    "not the identity": (("identity_at_init=self.start == 0", "identity_at_init=True"), "identity_at_init"),
}


def test_the_contract_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """For the documentation's method outside the checkout, with torch alone; broken ones fail with one line each."""
    page = (ROOT / "docs/add-a-method.md").read_text()
    source = page.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "scaled.py").write_text(source)
    for name, ((right, wrong), _) in BROKEN.items():
        assert right in source
        (tmp_path / f"{name.replace(' ', '_')}.py").write_text(source.replace(right, wrong))
    out = run(
        f"""
        OUT_OF_REACH = {{"transformers", "tensorly", "pytest", "beartype", "hypothesis", "peft", "benchmarks", "tests"}}
        class Without:
            # A finder that does not find these, as if they were not installed.
            def __init__(self, finder):
                self.finder = finder
            def find_spec(self, name, path=None, target=None):
                return None if name.partition(".")[0] in OUT_OF_REACH else self.finder.find_spec(name, path, target)
            def __getattr__(self, name):
                return getattr(self.finder, name)
        sys.meta_path[:] = map(Without, sys.meta_path)
        sys.path.insert(0, {str(tmp_path)!r})
        import importlib, torch
        torch.set_num_threads(1)
        import moepeft, moepeft.testing
        assert moepeft.__file__.startswith({str(installed)!r})
        for start in (0.0, 0.5):
            moepeft.testing.check_method(importlib.import_module("scaled").Scaled(start=start))
        for name in {[name.replace(" ", "_") for name in BROKEN]!r}:
            try:
                moepeft.testing.check_method(importlib.import_module(name).Scaled(start=0.5))
            except moepeft.MoepeftError as error:
                print(type(error).__name__, error)
            else:
                print("passed", name)
        """,
        installed,
        tmp_path,
    )
    lines = out.splitlines()
    assert len(lines) == len(BROKEN)
    for line, (_, named) in zip(lines, BROKEN.values(), strict=True):
        assert line.startswith("ContractError scaled on ")
        assert named in line


def test_importing_takes_torch_and_little_else(installed: Path, tmp_path: Path) -> None:
    """No method is imported before it is asked for, and no package beyond what the library's core needs."""
    out = run(
        """
        import torch, jaxtyping, importlib.metadata, safetensors.torch
        before = set(sys.modules)
        import moepeft
        added = {name for name in set(sys.modules) - before if name not in sys.stdlib_module_names}
        others = {name.partition(".")[0] for name in added} - {"moepeft"} - sys.stdlib_module_names
        print(sorted(others), any(name.startswith("moepeft.methods.") for name in added))
        """,
        installed,
        tmp_path,
    )
    assert out == "[] False"


def test_lowest_versions_are_those_promised() -> None:
    """What `make test-lowest` installs is each lower bound; torch is left out, and the file says why."""
    text = (ROOT / "constraints-lowest.txt").read_text()
    pinned = dict(line.split("==") for line in text.splitlines() if "==" in line)
    extras = PROJECT["optional-dependencies"]
    promised = [*PROJECT["dependencies"], *(bound for name in ("peft", "trainer", "tucker") for bound in extras[name])]
    bounds = dict(requirement.split(">=") for requirement in promised)
    assert set(bounds) <= set(pinned)
    for name, version in bounds.items():
        if name == "torch":
            assert "torch is the exception" in text
        else:
            assert pinned[name].startswith(version), name
