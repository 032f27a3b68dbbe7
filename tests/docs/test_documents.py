"""What README, CONTRIBUTING and the documentation show runs as it stands there."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from torch import nn

import moepeft
from moepeft import registry
from moepeft.registry import factory_class

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
METHOD_PAGES = {name: f"docs/methods/{name}.md" for name in registry.METHODS}
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def with_language(language: str) -> list[str]:
    return [document for document in DOCUMENTS if blocks(document, language)]


# ---------------------------------------------------------------------- Python


# Those left out have tests of their own, which look at what comes out as well.
@pytest.mark.parametrize(
    "document", sorted({*with_language("python")} - {"README.md", "docs/add-a-method.md", "docs/tutorial.md"})
)
@pytest.mark.filterwarnings("ignore:.*pin_memory.*")  # there is no accelerator to pin for
def test_python_blocks_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page by page in one scope, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    scope: dict[str, Any] = {"__name__": "document"}
    for number, block in enumerate(blocks(document, "python")):
        if included := SNIPPET.findall(block):
            # An example that `test_examples` runs.
            assert all((ROOT / name).is_file() and name.startswith("examples/") for name in included), included
            continue
        exec(compile(block, f"{document}, block {number}", "exec"), scope)


def test_the_readme_example_shows_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks("README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 22
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert (tmp_path / "ept-adapters" / "adapter.safetensors").is_file()
    assert scope["tokens"].shape == (6, 6)
    assert scope["adapters"].merged


@pytest.fixture
def seventh(monkeypatch: pytest.MonkeyPatch) -> str:
    """The documentation's method, registered from outside through an entry point."""
    (source,) = blocks("docs/add-a-method.md", "python")
    (declared,) = blocks("docs/add-a-method.md", "toml")
    points = tomllib.loads(declared)["project"]["entry-points"][registry.ENTRY_POINT_GROUP]
    ((name, target),) = points.items()
    module = types.ModuleType("outside")
    monkeypatch.setitem(sys.modules, "outside", module)
    exec(compile(source, "docs/add-a-method.md", "exec"), module.__dict__)
    point = importlib.metadata.EntryPoint(name, f"outside:{target.partition(':')[2]}", registry.ENTRY_POINT_GROUP)
    found = importlib.metadata.EntryPoints([point])
    monkeypatch.setattr(registry, "entry_points", found.select)
    return str(name)


def test_a_seventh_method_takes_one_file(seventh: str, tmp_path: Path) -> None:
    assert seventh in moepeft.available()
    assert seventh not in registry.METHODS
    factory: Any = moepeft.method(seventh, num_tasks=3, start=0.5)
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


# ---------------------------------------------------------------------- commands


class Parsed(Exception):
    """Carries what a command line was parsed to out of the command, before it does anything."""

    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options


def parse(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``python -m module words`` takes its words for; SystemExit if it does not take them."""

    def stopping(original: Callable[..., Any]) -> Callable[..., Any]:
        def parse_and_stop(*args: Any, **kwargs: Any) -> Any:
            raise Parsed(original(*args, **kwargs))

        return parse_and_stop

    packages = ("benchmarks.gpu", "benchmarks.speed", "tests.library.architectures")
    command = importlib.import_module(f"{module}.__main__" if module in packages else module)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with monkeypatch.context() as patch:
        if hasattr(command, "parse_flags"):
            patch.setattr(command, "parse_flags", stopping(command.parse_flags))
        else:
            patch.setattr(tyro, "cli", stopping(tyro.cli))
        patch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))
        with pytest.raises(Parsed) as parsed:
            command.main()
    return parsed.value.options


def commands() -> Iterator[str]:
    """Every line of a console block, and every command of the project that stands within a line of text."""
    for document in DOCUMENTS:
        for block in blocks(document, "console"):
            yield from (line.partition("  #")[0].strip() for line in block.splitlines())
        yield from re.findall(r"`(python -m (?:benchmarks|tests)[^`]*)`", (ROOT / document).read_text())


COMMANDS = list(dict.fromkeys(commands()))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags exist and their values are of the right kind; suites, tasks, methods, targets and extras are known."""
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        asked = [extra for group in re.findall(r"\.\[(.+)\]", command) for extra in group.split(",")]
        assert set(asked) <= set(project["optional-dependencies"]), command
    elif words[:3] == ["python", "-m", "timeit"]:
        # Run once, in a process of its own: what is timed may switch things for its whole process.
        timed = words[words.index("-s") :]
        subprocess.run([sys.executable, "-m", "timeit", "-n", "1", "-r", "1", *timed], check=True, cwd=ROOT)
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:])
    elif words[0] == "python" and words[1].startswith("examples/"):
        # Its own flags are tested where it runs; what it hands on to the runner is checked here.
        assert (ROOT / words[1]).is_file()
        if "--" in words:
            check_run(parse("benchmarks.run", words[words.index("--") + 1 :], monkeypatch))
    else:
        assert words[:2] == ["python", "-m"], f"no test knows {command!r}"
        options = parse(words[2], words[3:], monkeypatch)
        if words[2] == "benchmarks.run":
            check_run(options)


def check_run(options: Any) -> None:
    from benchmarks import run
    from benchmarks.methods.parse import parse_methods

    if options.suite == run.MECHANISMS:
        from benchmarks.mechanisms.experiments import load_experiment

        for name in options.tasks or ():
            load_experiment(name)
        parse_methods(options.methods, num_tasks=2)
        return
    suite = options.suite if Path(options.suite).suffix != ".toml" else "quick"
    protocol = run.resolve_suite(dataclasses.replace(options, data_dir=None, suite=suite))
    # A file of the reader's own is not there to be read.
    parse_methods([name for name in options.methods if ".py:" not in name], num_tasks=len(protocol.tasks))


def test_a_wrong_command_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("python -m benchmarks.run --stepps 3", "python -m benchmarks.claims --readme x"):
        with pytest.raises(SystemExit):
            test_commands_are_understood(command, monkeypatch)
    with pytest.raises(ValueError, match="there is no task"):
        test_commands_are_understood("python -m benchmarks.run --tasks nosuch", monkeypatch)


# ---------------------------------------------------------------------- text


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if not name.startswith("docs/")])
def test_links_lead_somewhere(document: str) -> None:
    """Those of the site are checked when it is built."""
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("name", METHOD_PAGES)
def test_a_method_page_has_every_difference_of_the_release(name: str) -> None:
    page = (ROOT / METHOD_PAGES[name]).read_text()
    cls = factory_class(name)
    for field, value in cls.presets["released"].items():
        shown = f'{field}="{value}"' if isinstance(value, str) else f"{field}={value}"
        assert f"`{shown}`" in page, shown
    assert f"::: {cls.__module__}.{cls.__name__}\n" in page  # the table of hyper-parameters is made from the code
    assert all((ROOT / "docs/methods" / picture).is_file() for picture in re.findall(r"\]\((img/[^)]+)\)", page))
    assert f"]({name}.md)" in (ROOT / "docs/methods/index.md").read_text()
    head = ast.get_docstring(ast.parse(Path(str(sys.modules[cls.__module__].__file__)).read_text())) or ""
    (paper,) = re.findall(r"arXiv\s+(\d{4}\.\d{5}|\d{4}\.\d{4})", head)[:1]
    assert paper in page
    assert set(re.findall(r"commit (\w{8})", head)) <= set(re.findall(r"commit (\w{8})", page))


# ---------------------------------------------------------------------- code


def test_import_needs_no_benchmark_extra() -> None:
    """The library imports where only its core dependencies are installed."""
    extras = ("datasets", "evaluate", "pandas", "pydantic", "tyro", "sklearn", "matplotlib", "peft", "rich", "tabulate")
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in extras)
    code = f"import sys\n{blocked}\nimport moepeft\nfor name in moepeft.available(): moepeft.method(name)"
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True, cwd=ROOT)


def test_every_fault_of_the_table_is_reproduced_by_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")]
    cases = [row for row in rows if not row.startswith(("| fault", "| ---"))]
    assert len(cases) > 10
    for row in cases:
        file, name = re.findall(r"`(tests/[\w/]+\.py)::(\w+)` \|$", row)[0]
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), row
