"""``python -m benchmarks.run --suite mechanisms``: run the experiments, write their tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from joblib import cpu_count
from rich.console import Console

from benchmarks.mechanisms.asked import Asked, write_asked
from benchmarks.mechanisms.build import build_mechanisms
from benchmarks.mechanisms.experiments import Experiment, available_experiments, load_experiment, shortened
from benchmarks.mechanisms.suite import Say, Suite
from benchmarks.methods.parse import parse_methods
from benchmarks.methods.registered import Moepeft
from benchmarks.plan.options import Options, cells_at_once
from benchmarks.protocols.errors import UsageError
from benchmarks.reporting.build import Report, write_files

KNOWN_FLAGS = ("suite", "methods", "tasks", "seeds", "steps", "jobs", "results")

# What runs without flags must answer in minutes. The files say what the full form is.
SHORT_EXPERIMENTS, SHORT_SEEDS, SHORT_STEPS = ("conflict",), (0, 1, 2), 300
FULL = "--tasks all --seeds 0,1,2,3,4,5,6,7,8,9 --steps 0"


def run_suite(options: Options, console: Console, command: str) -> int:
    """Run what the command line asks for; 0 if the tables were written.

    Without `--tasks`, `--seeds` and `--steps` the suite runs in a short form. ``--tasks all`` names every experiment,
    and ``--steps 0`` leaves each experiment its own number of steps.

    Raises:
        UsageError: a flag means nothing here, or a name is unknown.
    """
    default = Options()
    for field in fields(Options):
        if field.name not in KNOWN_FLAGS and getattr(options, field.name) != getattr(default, field.name):
            flag = field.name.replace("_", "-")
            raise UsageError(f"--{flag} means nothing with --suite mechanisms; it knows {', '.join(KNOWN_FLAGS[1:])}")
    methods = [name for name, one in parse_methods(options.methods, num_tasks=2).items() if isinstance(one, Moepeft)]
    short = options.tasks is None and options.seeds is None and options.steps is None
    names = options.tasks or SHORT_EXPERIMENTS
    steps = SHORT_STEPS if short else options.steps or None
    experiments = load_experiments(
        available_experiments() if names == ("all",) else names,
        steps=steps,
        seeds=options.seeds or (SHORT_SEEDS if short else None),
    )
    root = options.results or Path("results") / "mechanisms"
    # A student takes one core, and what it learns does not depend on what runs beside it.
    jobs = cells_at_once(options, cpu_count())
    run_mechanisms(experiments, methods, root, jobs=jobs, command=command, say=console.print)
    if short:
        console.print(f"This was the short form. The full form: python -m benchmarks.run --suite mechanisms {FULL}")
    return 0


def run_mechanisms(
    experiments: Sequence[Experiment], methods: Sequence[str], root: Path, *, jobs: int, command: str, say: Say
) -> None:
    """Run every experiment to its tables.

    Args:
        experiments: what is asked.
        methods: for experiments that name none.
        root: results folder.
        jobs: students side by side.
        command: as it was typed.
        say: prints one line.
    """
    suite = Suite(root, methods, jobs=jobs, command=command, say=say)
    for experiment in experiments:
        suite.run(experiment)
        write_asked(root, Asked(experiment=experiment, methods=tuple(methods), command=command))
        report = build_mechanisms(root)
        write_files(root, report)
        say("\n".join(read_tables(report, experiment.name)))


def read_tables(report: Report, experiment: str) -> list[str]:
    """The Markdown of one experiment's tables."""
    names = (name for name in report.tables if name.startswith(f"tables/{experiment}-") and name.endswith(".md"))
    return [report.tables[name].decode() for name in names]


def load_experiments(names: Sequence[str], *, steps: int | None, seeds: Sequence[int] | None) -> list[Experiment]:
    """Experiments by name, with the command line's steps and seeds."""
    return [shortened(load_experiment(name), steps=steps, seeds=seeds) for name in names]
