"""The results block of a README: the table of scores of the results folder that its first marker names."""

from __future__ import annotations

import re
from pathlib import Path

BEGIN, END = re.compile(r"<!-- results:begin (\S+) -->"), "<!-- results:end -->"


VERDICT = re.compile(r"(<!-- verdict:begin -->\n).*?(<!-- verdict:end -->)", re.DOTALL)


class ReadmeError(ValueError):
    """A README that lacks the markers, or has them more than once."""


def find_folder(path: Path) -> Path:
    """The results folder that the block of `path` shows; its marker names the folder relative to the README."""
    return path.parent / _split(path)[1]


def update_readme(path: Path, scores: str) -> str:
    """The text of `path` with its results block replaced; nothing is written.

    Args:
        path: the README.
        scores: the Markdown of the table of scores.
    """
    before, folder, after = _split(path)
    # The table stands under a heading of the README: one level down.
    nested = re.sub(r"^(#+ )", r"#\1", scores, flags=re.MULTILINE)
    tables, figures = (f"[`{folder}/{kind}`]({folder}/{kind})" for kind in ("tables", "figures"))
    links = f"Every table is in {tables}, every figure in {figures}."
    return f"{before}<!-- results:begin {folder} -->\n\n{nested}\n{links}\n\n{END}{after}"


def update_verdict(text: str, summary: str) -> str:
    """The text of a README with its block of the verdict replaced, if it has one."""
    return VERDICT.sub(lambda found: f"{found[1]}\n{summary}\n\n{found[2]}", text)


def _split(path: Path) -> tuple[str, str, str]:
    """What stands before the block, the folder that the block shows, and what stands after the block."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ReadmeError(f"cannot read {path}: {error}") from error
    begins = list(BEGIN.finditer(text))
    if len(begins) != 1 or text.count(END) != 1 or begins[0].end() > text.index(END):
        raise ReadmeError(
            f"{path} needs the lines <!-- results:begin results/FOLDER --> and {END}, once each and in this order, "
            "around its results"
        )
    return text[: begins[0].start()], begins[0][1], text[text.index(END) + len(END) :]
