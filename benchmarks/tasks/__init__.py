"""All tasks by name."""

from __future__ import annotations

from pathlib import Path

from moepeft.errors import did_you_mean

from .base import Example, TaskData, TaskSpec
from .commonsense import COMMONSENSE_TASKS, load_commonsense
from .flipped import flip, flip_spec
from .glue import GLUE_TASKS, load_glue
from .loading import DataUnavailable, InvalidData, UnknownTask
from .own import is_task_file, load_own
from .quick import QUICK_TASKS, load_quick

__all__ = [
    "TASKS",
    "DataUnavailable",
    "Example",
    "InvalidData",
    "TaskData",
    "TaskSpec",
    "UnknownTask",
    "is_task_file",
    "load_task",
]

_QUICK: dict[str, TaskSpec] = {spec.name: spec for spec in QUICK_TASKS}

# Every task that `load_task` knows.
_PLAIN: dict[str, TaskSpec] = {**_QUICK, **GLUE_TASKS, **COMMONSENSE_TASKS}
_FLIPPED: dict[str, str] = {flip_spec(_PLAIN[name]).name: name for name in ("q_sst2", "sst2")}
TASKS: dict[str, TaskSpec] = {**_PLAIN, **{name: flip_spec(_PLAIN[of]) for name, of in _FLIPPED.items()}}


def load_task(name: str, *, data_dir: Path | None = None) -> TaskData:
    """Loads a task of any suite.

    Args:
        name: a key of `TASKS`, or the path of a TOML file that describes an own task (`benchmarks.tasks.own`).
        data_dir: folder with the files of the real tasks; ``None`` loads them from the hub. Generated tasks
            need neither.

    Raises:
        UnknownTask: no task is called so.
        DataUnavailable: the rows cannot be had; the message names the ways out.
        InvalidData: rows were found that cannot be used.
    """
    if is_task_file(name):
        task = load_own(Path(name))
        if task.spec.name in TASKS:
            raise InvalidData(f"{name}: name = {task.spec.name!r} is a built-in task's name; choose another one")
        return task
    if name in _QUICK:
        return load_quick(name)
    if name in _FLIPPED:
        return flip(load_task(_FLIPPED[name], data_dir=data_dir))
    if name in GLUE_TASKS:
        return load_glue(name, data_dir=data_dir)
    if name in COMMONSENSE_TASKS:
        return load_commonsense(name, data_dir=data_dir)
    raise UnknownTask(f"No task is called {name!r}.{did_you_mean(name, TASKS)}")
