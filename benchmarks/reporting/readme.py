"""The results block of a README, written from the same tables as the results folders."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


class ReadmeError(ValueError):
    """A README that lacks the markers, or has them more than once."""


def updated_readme(path: Path, sections: Sequence[tuple[Path, str, Collection[str]]]) -> str:
    """The text of `path` with its results block replaced; nothing is written.

    Args:
        path: the README.
        sections: by results folder its Markdown and the names of its files, of which the figures are linked.
    """
    before, _, after = _parts(path)
    blocks = [_section(path, root, markdown, files) for root, markdown, files in sections]
    return f"{before}{BEGIN}\n\n" + "\n".join(blocks) + f"\n{END}{after}"


def shown_folders(path: Path) -> tuple[str, ...]:
    """The results folders whose sections stand in the block of `path`, e.g. ``results/quick``."""
    return tuple(re.findall(r"^### (\S+)$", _parts(path)[1], flags=re.MULTILINE))


def _parts(path: Path) -> tuple[str, str, str]:
    """What stands before, between and after the markers."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ReadmeError(f"cannot read {path}: {error}") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReadmeError(f"{path} needs the lines {BEGIN} and {END}, once each and in this order, around its results")
    before, rest = text.split(BEGIN)
    block, after = rest.split(END)
    return before, block, after


def _section(path: Path, root: Path, markdown: str, files: Collection[str]) -> str:
    # The block stands under a heading of the README: one level down.
    nested = re.sub(r"^(#+ )", r"#\1", markdown, flags=re.MULTILINE)
    folder = Path(os.path.relpath(root.resolve(), path.resolve().parent)).as_posix()
    figures = [
        f"[{Path(name).stem.replace('-', ' ')}]({folder}/{name})" for name in sorted(files) if name.endswith(".svg")
    ]
    return nested + (f"\nFigures: {', '.join(figures)}.\n" if figures else "")
