"""``python -m benchmarks.run --suite mechanisms``: run the experiments, write their tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.mechanisms.experiments import Experiment, load_experiment, shortened
from benchmarks.mechanisms.figures import draw_scores
from benchmarks.mechanisms.frame import read_choices, read_frame
from benchmarks.mechanisms.suite import Say, Suite
from benchmarks.mechanisms.tables import mechanism_tables
from benchmarks.records.store import replacing
from benchmarks.reporting.render import to_csv, to_markdown


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
        say(write_tables(experiment, methods, suite))


def write_tables(experiment: Experiment, methods: Sequence[str], suite: Suite) -> str:
    """Write the experiment's tables and its figure from the archive; gives the tables as Markdown."""
    archive = suite.archive
    frame = read_frame(experiment, read_choices(experiment, methods, archive), archive)
    texts = []
    for table in mechanism_tables(experiment, frame):
        text = to_markdown(table)
        texts.append(text)
        _write(archive.root / "tables" / f"{table.name}.md", text.encode())
        _write(archive.root / "tables" / f"{table.name}.csv", to_csv([(experiment.name, table)]).encode())
    figure = draw_scores(experiment, frame)
    if figure is not None:
        _write(archive.root / "figures" / f"{experiment.name}.svg", figure)
    return "\n".join(texts)


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def load_experiments(names: Sequence[str], *, steps: int | None, seeds: Sequence[int] | None) -> list[Experiment]:
    """Experiments by name, with the command line's steps and seeds."""
    return [shortened(load_experiment(name), steps=steps, seeds=seeds) for name in names]
