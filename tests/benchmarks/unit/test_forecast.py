"""The time left for everything, from the cells that have ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from benchmarks.cells.forecast import Forecast, show_left, work_of


def cell(name: str, steps: int = 100, *, trains: bool = True) -> Any:
    """What a forecast reads of a planned cell."""
    protocol = SimpleNamespace(steps=steps)
    return SimpleNamespace(cell=SimpleNamespace(method=name, protocol=protocol), method=SimpleNamespace(trains=trains))


def test_the_time_left_counts_every_cell_at_the_pace_of_its_method():
    guess, lora, ept = cell("majority", trains=False), cell("lora"), cell("ept")
    forecast = Forecast(map(work_of, [guess, lora, lora, ept]))
    assert forecast.find_left() is None
    forecast.note(guess, 3.0)
    assert forecast.find_left() is None  # a guess says nothing of what trains
    assert forecast.find_left(lora, step=10, elapsed=2.0) == 3 * 100 * 0.2 - 2.0
    forecast.note(lora, 30.0)
    assert forecast.find_left() == 30.0 + 30.0
    assert forecast.find_left(lora, step=50, elapsed=20.0) == 60.0 - 20.0
    forecast.note(lora, 30.0)
    assert forecast.find_left(ept, step=10, elapsed=8.0) == 80.0 - 8.0
    forecast.note(ept, 80.0)
    assert forecast.find_left() == 0.0


def test_cells_at_once_and_later_ones_are_counted():
    trial, report = cell("lora", 50), cell("lora", 100)
    forecast = Forecast([work_of(trial), work_of(report), work_of(report)], jobs=2)
    forecast.note(trial, 10.0)
    assert forecast.find_left() == 2 * 100 * 0.2 / 2


def test_the_time_left_is_shown_in_hours_where_there_are_any():
    assert [show_left(seconds) for seconds in (None, 0.4, 65, 3661)] == [
        "time left unknown",
        "0:00 left",
        "1:05 left",
        "1:01:01 left",
    ]
