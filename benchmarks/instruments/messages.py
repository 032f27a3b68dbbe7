"""What other libraries say while a command runs: to a file, so that the screen holds the command's own lines."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import TextIO

FILE = "libraries.log"


class LibraryLog(io.TextIOBase):
    """A stream into a file that is made with the first line.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def write(self, text: str) -> int:
        """Append; a disk that is full must not end the cell that a library wanted to say something in."""
        with suppress(OSError):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8", buffering=1)
            self._file.write(text)
        return len(text)


@contextmanager
def library_messages(root: Path) -> Iterator[None]:
    """Inside, what is written to `sys.stderr` goes to ``libraries.log`` in `root`: warnings, logs, bars of progress.

    A console made before keeps its stream. A traceback that leaves the block is shown as ever.
    """
    with redirect_stderr(LibraryLog(root / FILE)):
        yield


def send_messages(root: Path) -> None:
    """The same for the rest of this process."""
    sys.stderr = LibraryLog(root / FILE)
