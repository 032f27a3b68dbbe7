"""Learning rates by successive halving (Jamieson and Talwalkar, 2016), on a grid that grows until the best is inside.

Every method gets the same first grid, the same rungs and the same rule. What a method gets beyond is what its best
rate asks for. A method whose best rate still lies at an end of its grid is reported as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.mechanisms.experiments import Experiment
from benchmarks.mechanisms.runs import Archive, Run, plan_run

Execute = Callable[[Sequence[Run]], None]

# A run that ends below this share is as bad as one that diverged: by how much it missed must not decide a mean.
WORST = -1.0


@dataclass(frozen=True)
class Choice:
    """A method's rate.

    Attributes:
        method: its name.
        rate: the best one.
        tried: every rate of the last rung with its mean score, ascending.
        at_edge: the best rate is an end of all that was tried.
    """

    method: str
    rate: float
    tried: tuple[tuple[float, float], ...]
    at_edge: bool


def choose_rate(experiment: Experiment, method: str, archive: Archive, execute: Execute) -> Choice:
    """Find the rate of one method.

    Args:
        experiment: with teachers, lesson and grid.
        method: to be tuned.
        archive: of the runs made so far; trials that it holds are not made again.
        execute: makes runs and enters them into the archive.
    """
    tuning = experiment.tuning
    factor = (tuning.rates[-1] / tuning.rates[0]) ** (1 / max(1, len(tuning.rates) - 1))
    first = _scores(experiment, method, tuning.rates, tuning.first_steps, archive, execute)
    survivors = sorted(tuning.rates, key=lambda rate: -first[rate])[: math.ceil(len(tuning.rates) / 2)]
    steps = experiment.lesson.steps
    last = _scores(experiment, method, survivors, steps, archive, execute)
    for _ in range(tuning.extensions):
        outer = _next_beyond(last, factor)
        if outer is None:
            break
        last |= _scores(experiment, method, (outer,), steps, archive, execute)
    best = max(sorted(last), key=lambda rate: last[rate])
    tried = tuple(sorted(last.items()))
    return Choice(method, best, tried, at_edge=_next_beyond(last, factor) is not None)


def _next_beyond(scores: dict[float, float], factor: float) -> float | None:
    """The rate to try next: a neighbour of the best one that was not tried; None if both neighbours were."""
    best = max(sorted(scores), key=lambda rate: scores[rate])
    for neighbour in (best * factor, best / factor):
        if not any(math.isclose(neighbour, rate, rel_tol=0.05) for rate in scores):
            return float(f"{neighbour:.2g}")
    return None


def _scores(
    experiment: Experiment, method: str, rates: Sequence[float], steps: int, archive: Archive, execute: Execute
) -> dict[float, float]:
    """Mean over teachers, sizes and tuning seeds by rate."""
    runs = {rate: trial_runs(experiment, method, rate, steps) for rate in rates}
    execute([run for some in runs.values() for run in some])
    means = {}
    for rate, some in runs.items():
        outcomes = [archive.find(run) for run in some]
        shares = [WORST if one is None or one.score is None else max(WORST, one.score) for one in outcomes]
        means[rate] = sum(shares) / len(shares)
    return means


def trial_runs(experiment: Experiment, method: str, rate: float, steps: int) -> list[Run]:
    """The runs of one trial: all teachers and sizes of the experiment, on the tuning seeds."""
    lesson = experiment.lesson.with_steps(steps, exams=False)
    return [
        plan_run(curriculum, lesson, method, factory, rate, seed)
        for curriculum in experiment.curricula()
        for _, factory in experiment.students(method, curriculum)
        for seed in experiment.tuning.seeds
    ]
