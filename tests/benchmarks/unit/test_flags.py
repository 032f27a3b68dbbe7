"""Flags of the commands: lists are one word with commas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from benchmarks.protocols.flags import parse_flags


@dataclass
class Options:
    modes: tuple[Literal["train", "decode"], ...] = ("train",)
    """What to time."""
    rates: tuple[float, ...] | Literal["none"] | None = None
    """Rates to try."""
    rows: int = 3
    """Rows."""


def read(*words: str) -> Options:
    return parse_flags(Options, words, "command")


def test_lists_are_separated_by_commas() -> None:
    assert read() == Options()
    assert read("--modes", "decode, train,") == Options(modes=("decode", "train"))
    assert read("--modes", "") == Options(modes=())
    assert read("--rates", "1e-3,2", "--rows", "4") == Options(rates=(1e-3, 2.0), rows=4)
    assert read("--rates", "none") == Options(rates="none")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--modes", "train,serve"], ["--modes", "'serve'", "train, decode"]),
        (["--rates", "1e-3,x"], ["--rates", "x"]),
        (["--rows", "1,2"], ["--rows"]),
    ],
)
def test_a_wrong_item_is_refused_by_name(words: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read(*words)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in said), printed


def test_help_shows_a_default_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_flags(Options, ["--help"], "command")
    assert stopped.value.code == 0
    assert "{train,decode},..." in capsys.readouterr().out


@dataclass
class Size:
    """How large."""

    rows: int = 3
    """Rows."""
    rank: int | None = None
    """Rank."""


@dataclass
class WhatIsRead:
    """Where from."""

    names: tuple[str, ...] | None = None
    """Names."""


@dataclass
class Grouped(Size, WhatIsRead):
    """Do it.

    Examples:
    command --rows 4
    """


def test_bases_are_groups_of_the_help_and_one_set_of_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_flags(Grouped, ["--names", "a,b", "--rank", "2"], "command") == Grouped(names=("a", "b"), rank=2)
    assert parse_flags(Grouped, [], "command") == Grouped()
    with pytest.raises(SystemExit):
        parse_flags(Grouped, ["--help"], "command")
    printed = capsys.readouterr().out
    assert printed.index("command --rows 4") < printed.rindex("--names STR,...") < printed.rindex("--rank INT")
    assert printed.index("Where from.") < printed.index("How large.")
    assert "None" not in printed
