"""What went wrong in a cell, in words that fit a table row and hold no path of this machine."""

from __future__ import annotations

import sys
import traceback

import torch

from benchmarks.records.provenance import ROOT
from benchmarks.records.schema import Status
from moepeft.errors import NoMatchingSite, Unsupported

_TRACEBACK_LINES = 20
_REASON_LENGTH = 500


class Diverged(RuntimeError):
    """A loss, a gradient or an answer is not finite."""


def status_of(error: Exception) -> Status:
    """How a cell that raised `error` has ended."""
    if isinstance(error, Diverged):
        return "diverged"
    if isinstance(error, NoMatchingSite | Unsupported):
        return "unsupported"
    # torch's allocator for the CPU raises a bare RuntimeError.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "oom"
    return "error"


def one_line(error: Exception) -> str:
    """Type and message, for the `reason` of a record."""
    return f"{type(error).__name__}: {' '.join(without_paths(str(error)).split())}"[:_REASON_LENGTH]


def traceback_tail(error: Exception) -> str:
    """The last lines of the traceback."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return without_paths("\n".join(lines[-_TRACEBACK_LINES:]))


def without_paths(text: str) -> str:
    """The text with paths relative to the project or to the Python environment: records travel."""
    for folder in (sys.prefix, str(ROOT)):
        text = text.replace(f"{folder}/", "")
    return text
