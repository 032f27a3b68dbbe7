"""Records of runs: what one holds, where they are kept, and all of a folder as one frame (`Results`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.records.frame import Results

__all__ = ["Results"]


def __getattr__(name: str) -> Any:
    # Late: whoever wants the schema alone does not wait for pandas.
    if name == "Results":
        from benchmarks.records.frame import Results

        return Results
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
