"""An experiment: a question, the teachers that ask it, and the methods that answer. One TOML file each."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from benchmarks.mechanisms.students import Lesson
from benchmarks.mechanisms.teachers import Curriculum, FeedForward
from benchmarks.methods.matching import count, nearest
from benchmarks.methods.parse import parse_method
from benchmarks.methods.registered import Moepeft
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.halving import Halving
from moepeft import AdapterFactory
from moepeft.sites import find_sites

# Columns of the long frame (`benchmarks.mechanisms.frame`) beside the score.
Measure = Literal["swap_loss", "forgotten", "largest_share", "follows_size"]

FOLDER = Path(__file__).parent / "experiments"


class Experiment(BaseModel):
    """What is asked, of whom, and how.

    Attributes:
        name: stem of the file.
        question: one sentence.
        teacher: fields of the curriculum that all teachers share.
        vary: field of the curriculum -> its values; all combinations are asked.
        methods: names or name@preset; empty for those of the command line.
        oracle: the method that has all it needs; its row stands beside the bound.
        reference: the method that others are compared with.
        ranks_of_reference: sizes: every method is brought to the reference's size at these ranks; empty for own sizes.
        lesson: how students are trained.
        tuning: how rates are found, on teachers that are never reported.
        seeds: of the reported runs.
        show: columns of the long frame that get a table of their own beside the scores.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    question: str
    teacher: dict[str, Any] = Field(default_factory=dict)
    vary: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    methods: tuple[str, ...] = ()
    oracle: str
    reference: str
    ranks_of_reference: tuple[PositiveInt, ...] = ()
    lesson: Lesson = Lesson()
    tuning: Halving = Halving()
    seeds: tuple[int, ...] = tuple(range(10))
    show: tuple[Measure, ...] = ("swap_loss",)

    def curricula(self) -> tuple[Curriculum, ...]:
        """Every combination of the varied fields, in the order of the file."""
        reader = TypeAdapter(Curriculum)
        values = product(*self.vary.values())
        return tuple(reader.validate_python({**self.teacher, **dict(zip(self.vary, v, strict=True))}) for v in values)

    def contestants(self, methods: Sequence[str]) -> tuple[str, ...]:
        """The methods of the file or of the command line, reference and oracle among them, each once."""
        return tuple(dict.fromkeys((self.reference, *(self.methods or methods), self.oracle)))

    def students(self, method: str, curriculum: Curriculum) -> Iterator[tuple[int | None, AdapterFactory]]:
        """A method at its own size (None), or at the reference's size for each of the ranks."""
        factory = configure(method, curriculum.tasks)
        if not self.ranks_of_reference:
            yield None, factory
            return
        for rank in self.ranks_of_reference:
            yield rank, _as_large(method, self.reference, rank, curriculum)


@functools.cache  # a table asks for the same students many times
def _as_large(method: str, reference: str, rank: int, curriculum: Curriculum) -> AdapterFactory:
    """The method with as many numbers as the reference has at that rank."""
    sites = find_sites(FeedForward(curriculum.width, curriculum.inner))
    target = count(replace(configure(reference, curriculum.tasks), rank=rank), sites)
    return nearest(configure(method, curriculum.tasks), sites, target).factory


@functools.cache
def configure(method: str, tasks: int) -> Any:
    """The configuration of a registered method, by name, preset and fields as on the command line.

    Raises:
        UsageError: the method is not one of this library's.
    """
    parsed = parse_method(method, tasks)
    if not isinstance(parsed, Moepeft):
        raise UsageError(f"{method!r} is no method of this library; the mechanisms compare registered methods")
    return parsed.factory


def available_experiments() -> tuple[str, ...]:
    """Names of the experiments that come with the project."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load_experiment(name: str) -> Experiment:
    """Read an experiment by name or by the path of a TOML file.

    Raises:
        UsageError: no such experiment, or a field that it does not have or cannot hold.
    """
    path = FOLDER / f"{name}.toml" if name in available_experiments() else Path(name)
    if path.suffix != ".toml" or not path.is_file():
        raise UsageError(f"unknown experiment {name!r}: give {', '.join(available_experiments())} or a TOML file")
    try:
        experiment = Experiment.model_validate({"name": path.stem, **tomllib.loads(path.read_text(encoding="utf-8"))})
        experiment.curricula()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a TOML file: {error}") from error
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, one['loc'])) or 'fields'}: {one['msg']}" for one in error.errors())
        raise UsageError(f"{path}: {'; '.join(problems)}") from error
    return experiment


def shortened(experiment: Experiment, *, steps: int | None, seeds: Sequence[int] | None) -> Experiment:
    """The experiment with another number of steps, or other seeds."""
    changes: dict[str, Any] = {}
    if steps is not None:
        changes["lesson"] = experiment.lesson.with_steps(steps)
    if seeds is not None:
        changes["seeds"] = tuple(seeds)
    return experiment.model_copy(update=changes)
