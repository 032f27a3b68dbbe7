"""The flags of ``python -m benchmarks.run``, and what they resolve to."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import CompileMode, Suite, load_suite


@dataclass(frozen=True)
class Compared:
    """Methods, tasks and the model."""

    methods: tuple[str, ...] = ("all",)
    """Comma-separated methods, each with or without @preset and fields, e.g. lora@rank=16; `all` registered ones;
    NAME@ablations for one and what it can do without; path/to/file.py:Class for one of your own; peft:NAME; `full`
    fine-tuning. The rows `majority` and `head` (`bare` for text answers) are always there."""
    suite: str = "quick"
    """quick, glue, commonsense, commonsense-smollm2, glue-t5, commonsense-llama,
    conflict-sst2, transfer, or the path of a protocol in TOML.
    mechanisms: students of teachers with known truth; its tasks are experiments, and of the flags it knows methods,
    tasks, seeds, steps, jobs, results."""
    tasks: tuple[str, ...] | None = None
    """Comma-separated tasks instead of the suite's own: names, or TOML files that describe own data."""
    data_dir: Path | None = None
    """Folder with the real data as parquet files; without it they come from the hub."""
    backbone: str | None = None
    """minilm, smollm2, deberta-v3-base, t5-base, llama-2-7b, a hub id (with or without @revision), a local folder, or
    for tests tiny-bert, tiny-t5, tiny-llama."""
    pooling: Literal["mean", "first", "last"] | None = None
    """What heads read of an encoder: the mean over tokens (as the suites do), the first token or the last."""
    reference: str | None = None
    """Method that scores and speed are compared with, e.g. the full one among its ablations."""


@dataclass(frozen=True)
class Training:
    """The budget, equal for all methods."""

    seeds: tuple[int, ...] | None = None
    """Comma-separated seeds, e.g. 0,1,2."""
    steps: int | None = None
    """Optimiser steps."""
    batch_size: int | None = None
    """Rows per step."""
    batches: Literal["mixed", "single"] | None = None
    """single: every training batch holds rows of one task, as methods that route by the batch expect them."""
    scarce_rows: int | None = None
    """Training rows of the tasks of the endpoint, e.g. 50 of --suite transfer; the other tasks keep theirs."""
    learning_rate: float | None = None
    """Peak learning rate."""
    tune: tuple[float, ...] | Literal["none"] | None = None
    """Comma-separated learning rates, e.g. 2e-4,5e-4,1e-3,2e-3, or none: every method tries all of them on rows
    cut from the training rows, with a seed of its own for that, and is reported at its best one."""
    tune_steps: int | None = None
    """Optimiser steps of such a trial; unset: as many as the reported runs have."""
    track: Literal["as-published", "matched"] | None = None
    """matched: choose every method's rank so that all have as many parameters as the reference method."""
    target_parameters: int | None = None
    """Trainable adapter numbers of the matched track, instead of the reference method's."""


@dataclass(frozen=True)
class Scoring:
    """Texts and the rows that are scored."""

    eval_rows: int | None = None
    """Score at most this many rows per task, a seeded subset that is the same for all methods."""
    official_splits: bool = False
    """Test on the official rows, also where the suite fills small test sets from the training rows."""
    evaluate_on: Literal["reported", "fold"] | None = None
    """fold: score rows cut from the training rows instead of the reported ones, to choose a setting by."""
    task_prefix: bool = False
    """Begin every text with its task's name: a control that tells the task to methods without task embeddings."""


@dataclass(frozen=True)
class Machine:
    """Where and in which order cells run; no part of what a cell gives, but for precision and compiler."""

    results: Path | None = None
    """Folder for records and tables; unset: results/<suite>."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; no part of a cell's identity."""
    precision: Literal["auto", "fp32", "bf16"] | None = None
    """bf16 is autocast; auto takes it where the hardware computes it natively."""
    compile: CompileMode | None = None
    """Mode of torch.compile of training steps; scores are computed eagerly. What compiling takes is in no time."""
    rerun: Literal["missing", "failed", "all"] = "missing"
    """Which cells to run: those without a finished record, also failed ones, or all."""
    shard: str | None = None
    """i/n, i from 0: only the i-th part of the cells (with --tune: of the methods), for n runs into one folder.
    Processes that torchrun or `accelerate launch` starts take one each by themselves."""
    jobs: int | None = None
    """Cells at once, each in a process with its part of the cores. Without timing pass if there are several. Unset: one
    cell; students of the mechanisms, which take one core each, on all cores."""
    plan: bool = False
    """Print the cells and which are done, then stop."""


@dataclass(frozen=True)
class Options(Machine, Scoring, Training, Compared):
    """Train methods under one protocol and write tables of parameters, scores and speed.

    Examples:
      python -m benchmarks.run --methods lora,ept --steps 50
          two methods on the quick suite, offline
      python -m benchmarks.run --methods lora,ept,moelora --tasks reviews.toml,q_rte
          data of your own beside a task of the suite
      python -m benchmarks.run --methods lora,mine.py:Mine --backbone path/to/model
          a method and a model of your own
      python -m benchmarks.run --suite glue --seeds 0,1,2 --jobs 2 --plan
          what a study would run, and what of the study is done
    """


def resolve_suite(options: Options) -> Suite:
    """The suite with the overrides of the command line; raises `UsageError` in one line."""
    suite = load_suite(options.suite)
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise UsageError(f"--data-dir {options.data_dir}: no such folder")
    if not options.methods:
        raise UsageError("--methods names no method; leave it out to run all")
    cells_at_once(options, 1)
    parse_shard(options.shard)
    rates = () if options.tune == "none" else options.tune
    if options.learning_rate is not None and (suite.tuning_rates if rates is None else rates):
        raise UsageError("--learning-rate and tuned rates exclude each other; --tune none gives one rate to all")
    tasks = _known_tasks(suite.tasks if options.tasks is None else options.tasks)
    if options.official_splits:
        suite = suite.model_copy(update={"test_rows": None})
    return suite.with_overrides(
        tasks=tasks,
        endpoint_tasks=tuple(name for name in suite.endpoint_tasks if name in tasks),
        seeds=options.seeds,
        backbone=options.backbone,
        steps=options.steps,
        batch_size=options.batch_size,
        batches=options.batches,
        scarce_rows=options.scarce_rows,
        learning_rate=options.learning_rate,
        reference=options.reference,
        pooling=options.pooling,
        tuning_rates=rates,
        tuning_steps=options.tune_steps,
        track=options.track,
        target_parameters=options.target_parameters,
        eval_rows=options.eval_rows,
        evaluate_on=options.evaluate_on,
        task_prefix=options.task_prefix or None,
        precision=options.precision,
        compiled=options.compile,
    )


def cells_at_once(options: Options, unset: int) -> int:
    """What `--jobs` says, or `unset`.

    Raises:
        UsageError: less than one.
    """
    jobs = unset if options.jobs is None else options.jobs
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: give the number of cells to run at once, 1 or more")
    return jobs


def _known_tasks(names: tuple[str, ...]) -> tuple[str, ...]:
    from benchmarks.tasks import TASKS, is_task_file
    from moepeft.errors import did_you_mean

    for name in names:
        if name not in TASKS and not is_task_file(name):
            raise UsageError(f"there is no task {name!r}.{did_you_mean(name, TASKS)}")
    # One order for all ways of writing the same list: the order is part of what a result depends on.
    known = list(TASKS)
    return tuple(sorted(names, key=lambda name: (known.index(name) if name in TASKS else len(known), name)))


def parse_shard(text: str | None) -> tuple[int, int]:
    """Which part of how many, from what one writes as ``0/2``; the only one of one without the flag."""
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = map(int, found.groups()) if found else (1, 0)
    if part >= parts:
        raise UsageError(f"--shard {text!r}: give i/n with i from 0 to n - 1, e.g. 0/2 and 1/2 for two runs")
    return part, parts


def launched_shard() -> str | None:
    """The shard of a process that torchrun or ``accelerate launch`` started beside others; None without them."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return f"{os.environ['RANK']}/{processes}" if processes > 1 else None
