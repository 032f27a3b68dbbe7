"""docs/architectures.md holds what is computed, and nothing that is silently wrong."""

from __future__ import annotations

import pytest

import moepeft

from . import table

COMMITTED = table.read(table.PAGE.read_text())


def test_the_page_has_every_architecture_and_every_method() -> None:
    assert list(COMMITTED) == list(table.HOSTS)
    assert all(tuple(row.outcomes) == moepeft.available() for row in COMMITTED.values())
    assert table.page(COMMITTED) == table.PAGE.read_text()


def test_no_cell_is_silently_wrong() -> None:
    wrong = {
        (name, method) for name, row in COMMITTED.items() for method, text in row.outcomes.items() if "WRONG" in text
    }
    assert not wrong
    assert len(COMMITTED) >= 80
    assert sum(set(row.outcomes.values()) == {table.OK} for row in COMMITTED.values()) >= 70


def test_every_clause_is_asked_of_many() -> None:
    for clause, least in (("rows", 100), ("padding", 60), ("cache", 30)):
        assert sum(clause in row.clauses.split(", ") for row in COMMITTED.values()) >= least


@pytest.mark.slow
@pytest.mark.parametrize("name", table.HOSTS)
def test_the_page_says_what_is(name: str, one_thread: None) -> None:
    assert table.compute_one(name) == COMMITTED[name]
