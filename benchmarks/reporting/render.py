"""One table in three formats: Markdown to read, CSV to compute with, LaTeX to publish."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from tabulate import LATEX_ESCAPE_RULES, tabulate

SPEED_OF = "Speed of "
"""Begins the heading of the tables of `benchmarks.speed`; the model follows."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table before it is rendered.

    Attributes:
        name: stem of its files, e.g. ``scores``.
        title: heading, with the protocol it belongs to.
        text: the cells as they are read; the first column names the row.
        data: the unrounded numbers behind it, one fact per row.
        notes: what one has to know to read this table.
    """

    name: str
    title: str
    text: pd.DataFrame
    data: pd.DataFrame
    notes: tuple[str, ...] = ()


def to_markdown(table: Table, caption: Sequence[str] = ()) -> str:
    """Heading, table, notes."""
    lines = "".join(f"- {note}\n" for note in (*table.notes, *caption))
    cells = table.text.map(lambda cell: str(cell).replace("|", r"\|"))
    return f"### {table.title}\n\n{_tabulate(cells, 'pipe')}\n" + (f"\n{lines}" if lines else "")


def to_latex(table: Table, caption: Sequence[str] = ()) -> str:
    """A ``table`` environment in booktabs style, its notes in the caption."""
    text = " ".join(_latex(line) for line in (f"{table.title}.", *table.notes, *caption))
    body = _tabulate(table.text, "latex_booktabs")
    return f"\\begin{{table}}\n\\centering\n\\caption{{{text}}}\n{body}\n\\end{{table}}\n"


def to_csv(tables: Sequence[tuple[str, Table]]) -> str:
    """The numbers of tables of one kind below each other, told apart by a first column ``protocol``."""
    frames = [table.data.assign(protocol=label) for label, table in tables]
    # Concatenating an empty frame would turn the other frames' integers into floats.
    joined = pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)
    return joined[["protocol", *joined.columns.drop("protocol")]].to_csv(
        index=False, lineterminator="\n", float_format="%.12g"
    )


def _tabulate(frame: pd.DataFrame, style: str) -> str:
    # Numbers come formatted: tabulate must neither parse nor align them by its own idea of digits.
    align = ["left", *["right"] * (len(frame.columns) - 1)]
    rows = frame.astype(str).values.tolist()
    text: str = tabulate(rows, headers=list(frame.columns), tablefmt=style, disable_numparse=True, colalign=align)
    return text


def _latex(text: str) -> str:
    escaped = "".join(LATEX_ESCAPE_RULES.get(letter, letter) for letter in text)
    return re.sub(r"`([^`]*)`", r"\\texttt{\1}", escaped)
