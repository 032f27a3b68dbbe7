"""How long the cells that have not ended will take, from those that have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from statistics import fmean

from benchmarks.plan.cells import PlannedCell

Work = tuple[str, int]
"""A method and the number of its steps; zero of what does not train, which takes no time worth naming."""


class Forecast:
    """Seconds per step of every method that has ended a cell; another method is taken for as slow as the slowest.

    Args:
        ahead: the work of all cells that have not ended.
        jobs: cells at once.
    """

    def __init__(self, ahead: Iterable[Work], jobs: int = 1) -> None:
        self._ahead, self._jobs = Counter(ahead), jobs
        self._pace: dict[str, list[float]] = {}

    def note(self, planned: PlannedCell, seconds: float) -> None:
        """A cell has ended."""
        name, steps = work = work_of(planned)
        self._ahead -= Counter([work])
        if steps:
            self._pace.setdefault(name, []).append(seconds / steps)

    def find_left(self, running: PlannedCell | None = None, step: int = 0, elapsed: float = 0.0) -> float | None:
        """Seconds until the last cell ends; None while nothing is known of any method.

        Args:
            running: the cell that runs.
            step: steps that it has made.
            elapsed: seconds since it began.
        """
        pace = {name: fmean(values) for name, values in self._pace.items()}
        if running is not None and step:
            pace.setdefault(running.cell.method, elapsed / step)
        if not any(steps for _, steps in self._ahead):
            return 0.0
        if not pace:
            return None
        slowest = max(pace.values())
        left = sum(number * steps * pace.get(name, slowest) for (name, steps), number in self._ahead.items())
        return max(0.0, left - elapsed) / self._jobs


def work_of(planned: PlannedCell) -> Work:
    """What a cell asks for."""
    return planned.cell.method, planned.cell.protocol.steps if planned.method.trains else 0


def show_left(seconds: float | None) -> str:
    """As a line of progress says it: ``1:05 left``."""
    if seconds is None:
        return "time left unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} left" if hours else f"{minutes}:{rest:02d} left"
