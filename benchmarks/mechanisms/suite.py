"""Run experiments: rates first, then the reported students, each to a line of the archive."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from joblib import Parallel, delayed

from benchmarks.mechanisms.experiments import Experiment
from benchmarks.mechanisms.runs import Archive, Run, execute, plan_run
from benchmarks.mechanisms.tuning import choose_rate
from benchmarks.protocols.halving import Choice

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reported:
    """A reported run and its place in the experiment.

    Attributes:
        run: what is run.
        size: rank of the reference whose size the method was brought to; None for its own size.
    """

    run: Run
    size: int | None


class Suite:
    """Experiments over one archive.

    Args:
        root: results folder.
        methods: of the command line, for experiments that name none.
        jobs: students side by side, one thread each.
        command: as typed, for the provenance.
        say: prints one line.
    """

    def __init__(self, root: Path, methods: Sequence[str], *, jobs: int, command: str, say: Say) -> None:
        self.archive = Archive(root)
        self._methods, self._jobs, self._say = tuple(methods), jobs, say
        self._command, self._machine = command, ""

    def run(self, experiment: Experiment) -> dict[str, Choice]:
        """Tune and run one experiment; gives every method's rate."""
        choices = {}
        for method in experiment.contestants(self._methods):
            choice = choose_rate(experiment, method, self.archive, self._make)
            choices[method] = choice
            edge = ", at an end of its grid" if choice.at_edge else ""
            self._say(f"{experiment.name}: {method} at rate {choice.rate:g}{edge}")
        start = time.perf_counter()
        reported = reported_runs(experiment, choices)
        self._make([one.run for one in reported])
        self._say(f"{experiment.name}: {len(reported)} runs ({time.perf_counter() - start:.0f} s)")
        return choices

    def _make(self, runs: Sequence[Run]) -> None:
        due = self.archive.missing(runs)
        if not due:
            return
        self._machine = self._machine or self.archive.note_machine(self._command)
        made = Parallel(n_jobs=self._jobs, return_as="generator_unordered")(
            delayed(execute)(run, self._machine) for run in due
        )
        for outcome in made:
            self.archive.add(outcome)


def reported_runs(experiment: Experiment, choices: dict[str, Choice]) -> list[Reported]:
    """Every reported run, seed by seed, so that an interrupted suite has whole seeds."""
    return [
        Reported(plan_run(curriculum, experiment.lesson, method, factory, choice.rate, seed), size)
        for seed in experiment.seeds
        for curriculum in experiment.curricula()
        for method, choice in choices.items()
        for size, factory in experiment.students(method, curriculum)
    ]
