"""A method from a file of one's own runs beside the registered ones, and what is wrong with it is one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from benchmarks.methods.own import load_own_method
from benchmarks.methods.parse import parse_methods
from benchmarks.protocols.errors import UsageError
from benchmarks.records.frame import Results
from benchmarks.run import main

TEXT = """
from dataclasses import dataclass

import torch
from torch import nn

from moepeft.config import MethodConfig
from moepeft.protocols import Capabilities


@dataclass(frozen=True, kw_only=True)
class Shift(MethodConfig):
    name = "shift"
    start: float = 0.0
    num_tasks: int = 1
    widths: tuple[int, ...] = (1, 2)

    @property
    def capabilities(self):
        return Capabilities(identity_at_init=self.start == 0, not_mergeable="it shifts the bias")

    def build(self, site, shared):
        return ShiftAdapter(site, self)

    def count(self, sites):
        return sum(site.out_features for site in sites)


class ShiftAdapter(nn.Module):
    def __init__(self, site, config):
        super().__init__()
        self.by = nn.Parameter(torch.full((site.out_features,), config.start))

    def forward(self, x, base, ctx):
        y = base(x)
        return y + self.by.to(y.dtype)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "shift.py"
    path.write_text(TEXT)
    return path


def test_the_method_is_known_by_its_own_name(file: Path) -> None:
    methods = parse_methods([f"{file}:Shift"], num_tasks=3)
    assert list(methods) == ["majority", "head", "shift"]
    assert methods["shift"].config()["num_tasks"] == 3


def test_another_text_is_another_method(file: Path) -> None:
    before = load_own_method(f"{file}:Shift", 2)
    file.write_text(TEXT.replace("y + self.by", "y - self.by"))
    after = load_own_method(f"{file}:Shift", 2)
    assert before.config() != after.config()


def test_a_worker_process_can_be_given_the_method(file: Path) -> None:
    method = load_own_method(f"{file}:Shift", 2)
    again = pickle.loads(pickle.dumps(method))
    assert again.config() == method.config()
    assert again.factory == method.factory


@pytest.mark.slow
def test_the_method_runs_beside_registered_ones(file: Path, tmp_path: Path) -> None:
    flags = ["--backbone", "tiny-bert", "--tasks", "q_rte", "--steps", "2", "--batch-size", "4", "--eval-rows", "8"]
    assert main(["--methods", f"lora,{file}:Shift", *flags, "--results", str(tmp_path / "results")]) == 0
    frame = Results.load(tmp_path / "results").frame()
    assert {"lora", "shift"} <= set(frame["label"])
    assert set(frame[frame["label"] == "shift"]["status"]) == {"ok"}


@pytest.mark.parametrize(
    ("text", "word", "named"),
    [
        (TEXT, "Gone", "no class 'Gone'"),
        (TEXT, "ShiftAdapter", "without name"),
        (TEXT.replace('"shift"', '"lora"'), "Shift", "'lora'"),
        ("import nothing_like_this", "Shift", "nothing_like_this"),
        (TEXT.replace("start: float = 0.0", "start: float"), "Shift", "start"),
    ],
    ids=["no class", "no method", "registered name", "does not import", "no defaults"],
)
def test_what_is_wrong_is_said_in_one_line(file: Path, text: str, word: str, named: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError) as refused:
        load_own_method(f"{file}:{word}", 2)
    assert "\n" not in str(refused.value)
    assert named in str(refused.value)
    with pytest.raises(UsageError, match="no file"):
        load_own_method(f"{file.with_name('gone.py')}:{word}", 2)
