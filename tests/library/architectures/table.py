"""The committed table: docs/architectures.md, a row for every architecture, a column for every method."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from .checks import outcomes
from .hosts import HOSTS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "architectures.md"
OK, BUT = "ok", "; "
HEAD = """# Which models it runs on

Every row is an architecture of transformers, made tiny from its configuration alone, with random weights. Every column
is a method, attached with its default layers. `python -m tests.library.architectures` rebuilds this page, and a test
holds the page to what the command computes (`make test-slow`).

*ok* means that all of these were checked and hold:

* the adapters change the output, and so does another task where the method routes by task;
* rows of a mixed batch give what they give alone (*rows*);
* the values of padding change neither outputs nor auxiliary losses (*padding*);
* a training step reaches every adapter at every adapted layer;
* greedy generation with a cache gives the logits that it gives without (*cache*);
* saved and loaded adapters give the same output bit for bit;
* a merged model gives what the routed model gives, and unmerging gives every weight back bit for bit;
* the detached model and the disabled model are the bare model bit for bit.

A clause in brackets is asked where the bare architecture has the property: the second column says which. A method is
asked what it promises (`capabilities`): TuckA's rows depend on their batch, so its rows are compared in another order.
A number instead of *ok* is a refusal, whose words stand below the table; *ok* with a number works but for what the
words say.
"""


class Row(NamedTuple):
    """One architecture: the clauses it is asked, and every method's outcome."""

    clauses: str
    outcomes: Mapping[str, str]


def compute_one(name: str, methods: Sequence[str] | None = None) -> Row:
    """One row of the table, of these methods or of all."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clauses, found = outcomes(name, methods)
    return Row(clauses, {method: _without_names(text) for method, text in found.items()})


def compute(names: Sequence[str], methods: Sequence[str] | None = None) -> Iterator[tuple[str, Row]]:
    """The rows of these architectures one after the other, made by a process per core."""
    if len(names) == 1:
        yield names[0], compute_one(names[0], methods)
        return
    with multiprocessing.get_context("spawn").Pool(min(len(os.sched_getaffinity(0)), 8)) as pool:
        yield from zip(names, pool.imap(functools.partial(compute_one, methods=methods), names), strict=True)


def page(rows: Mapping[str, Row]) -> str:
    """The whole page."""
    methods = list(next(iter(rows.values())).outcomes)
    notes: dict[str, int] = {}
    lines = [
        f"| architecture | input | asked | {' | '.join(methods)} |",
        f"| --- | --- | --- |{' :-: |' * len(methods)}",
    ]
    for name, row in rows.items():
        cells = [_cell(row.outcomes[method], notes) for method in methods]
        lines.append(f"| {name} | {HOSTS[name].kind} | {row.clauses} | {' | '.join(cells)} |")
    words = [f"{number}. {text}" for text, number in notes.items()]
    return "\n".join([HEAD, counted(rows), "", *lines, "", *words]) + "\n"


def counted(rows: Mapping[str, Row]) -> str:
    """How many architectures take every method."""
    whole = sum(all(text == OK for text in row.outcomes.values()) for row in rows.values())
    return f"{len(rows)} architectures, {whole} of them ok for every method (transformers {transformers.__version__})."


def read(text: str) -> dict[str, Row]:
    """The rows that a page holds."""
    notes = {f"({number})": words for number, words in re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE)}
    head, _, *lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = {}
    for name, _, clauses, *cells in lines:
        found = {method: _words(cell, notes) for method, cell in zip(head[3:], cells, strict=True)}
        rows[name] = Row(clauses.strip(), found)
    return rows


def _cell(text: str, notes: dict[str, int]) -> str:
    if text == OK:
        return OK
    works, _, words = text.rpartition(BUT)
    number = notes.setdefault(words, len(notes) + 1)
    return f"{works} ({number})" if works else f"({number})"


def _words(cell: str, notes: Mapping[str, str]) -> str:
    works, _, number = cell.rpartition(" ")
    if number == OK:
        return OK
    return f"{works}{BUT}{notes[number]}" if works else notes[number]


def _without_names(text: str) -> str:
    """Which layer it is, and how many tokens came there, depends on the architecture; what is wrong does not."""
    text = re.sub(r"'[\w.]*\.[\w.]*'", "'…'", text).replace("|", "/")
    return re.sub(r"for \d+ rows", "for … rows", re.sub(r"\(\d+,[\d, ]*\)", "(…)", text))
