"""Learning rates of students, on teachers that are never reported (`benchmarks.protocols.halving`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.mechanisms.experiments import Experiment
from benchmarks.mechanisms.runs import Archive, Run, plan_run
from benchmarks.protocols.halving import Choice, choose, floored

Execute = Callable[[Sequence[Run]], None]


def choose_rate(experiment: Experiment, method: str, archive: Archive, execute: Execute) -> Choice:
    """Find the rate of one method.

    Args:
        experiment: with teachers, lesson and grid.
        method: to be tuned.
        archive: of the runs made so far; trials that it holds are not made again.
        execute: makes runs and enters them into the archive.
    """

    def scores(rates: Sequence[float], steps: int) -> dict[float, float]:
        runs = {rate: trial_runs(experiment, method, rate, steps) for rate in rates}
        execute([run for some in runs.values() for run in some])
        means = {}
        for rate, some in runs.items():
            outcomes = [archive.find(run) for run in some]
            shares = [floored(None if one is None else one.score) for one in outcomes]
            means[rate] = sum(shares) / len(shares)
        return means

    return choose(method, experiment.tuning, experiment.lesson.steps, scores)


def trial_runs(experiment: Experiment, method: str, rate: float, steps: int) -> list[Run]:
    """The runs of one trial: all teachers and sizes of the experiment, on the tuning seeds."""
    lesson = experiment.lesson.with_steps(steps, exams=False)
    return [
        plan_run(curriculum, lesson, method, factory, rate, seed)
        for curriculum in experiment.curricula()
        for _, factory in experiment.students(method, curriculum)
        for seed in experiment.tuning.seeds
    ]
