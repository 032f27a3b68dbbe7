"""One student's run: what decides it, what came of it, and the archive of all that were made.

A run belongs to no experiment. Experiments that ask for the same run share it, and no run is made twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

import moepeft
from benchmarks.mechanisms.students import Lesson, blind_bound, teach
from benchmarks.mechanisms.teachers import Curriculum, make_teacher
from benchmarks.records.failures import one_line
from benchmarks.records.provenance import gather
from benchmarks.records.schema import Provenance
from benchmarks.records.store import RecordError
from moepeft.registry import from_config

ARCHIVE = "runs.jsonl"
MACHINES = "machines.jsonl"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Run(_Strict):
    """What decides the result of one student.

    Attributes:
        curriculum: of the teacher.
        lesson: how the student is trained and examined.
        method: as written on the command line: name or name@preset.
        config: the method's resolved hyper-parameters.
        rate: constant learning rate of AdamW.
        seed: of the teacher, of the student's start and of its inputs, which draw from three streams.
        draws: 2. Once all three began with the same numbers; such runs are not read.
    """

    curriculum: Curriculum
    lesson: Lesson
    method: str
    config: dict[str, Any]
    rate: float
    seed: int
    draws: Literal[2]

    @property
    def id(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the content."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Outcome(_Strict):
    """What came of a run.

    Attributes:
        run: what was run.
        status: how it ended.
        reason: why it did not end well.
        parameters: trainable numbers; None where the method could not be attached.
        bound: the highest mean R2 of a task-blind answer to this teacher.
        curve: by steps, R2 of every task.
        usage: by steps, the mean gate of every expert (inner) on the rows of every task (outer).
        swapped: R2 of task row's rows under task column's id.
        seconds: of training and exams.
        machine: hash of the provenance, whose text stands in `machines.jsonl`.
    """

    run: Run
    status: Literal["ok", "diverged", "unsupported", "error"]
    reason: str | None = None
    parameters: int | None = None
    bound: float
    curve: dict[int, tuple[float, ...]] = {}
    usage: dict[int, tuple[tuple[float, ...], ...]] = {}
    swapped: tuple[tuple[float, ...], ...] = ()
    seconds: float
    machine: str

    @property
    def score(self) -> float | None:
        """Mean R2 over tasks at the end; None if the run did not reach the end."""
        final = self.curve.get(self.run.lesson.steps)
        return None if final is None or self.status != "ok" else sum(final) / len(final)

    @property
    def forgotten(self) -> float | None:
        """Mean R2 that the tasks taught first lost while the others were taught; None if all were taught at once."""
        lesson = self.run.lesson
        before, after = self.curve.get(lesson.first_steps), self.curve.get(lesson.steps)
        if not lesson.first_tasks or before is None or after is None:
            return None
        first = range(lesson.first_tasks)
        return sum(before[task] - after[task] for task in first) / len(first)

    @property
    def largest_share(self) -> float | None:
        """The largest expert's share of all gates at the end, over all tasks; 1 is collapse, 1 / E is balance."""
        used = self.usage.get(self.run.lesson.steps)
        if not used:
            return None
        loads = [sum(column) for column in zip(*used, strict=True)]
        return max(loads) / sum(loads) if sum(loads) else None

    @property
    def swap_loss(self) -> float | None:
        """Mean R2 that a wrong id costs: 0 for a method that does not listen to ids."""
        if self.score is None or len(self.swapped) < 2:
            return None
        right = [row[task] for task, row in enumerate(self.swapped)]
        wrong = [row[told] for task, row in enumerate(self.swapped) for told in range(len(row)) if told != task]
        return sum(right) / len(right) - sum(wrong) / len(wrong)


def plan_run(curriculum: Curriculum, lesson: Lesson, method: str, factory: Any, rate: float, seed: int) -> Run:
    """The run of a configured method."""
    config = json.loads(json.dumps(dataclasses.asdict(factory)))
    return Run(curriculum=curriculum, lesson=lesson, method=method, config=config, rate=rate, seed=seed, draws=2)


def execute(run: Run, machine: str) -> Outcome:
    """Run one student to its outcome, whatever happens on the way."""
    torch.set_num_threads(1)  # tensors this small gain nothing from threads; the suite runs students side by side
    start = time.perf_counter()
    teacher = make_teacher(run.curriculum, run.seed)
    facts: dict[str, Any] = {"run": run, "machine": machine, "bound": blind_bound(teacher, run.lesson)}
    try:
        factory = from_config(run.method.partition("@")[0], run.config)
        report = teach(teacher, factory, run.lesson, rate=run.rate, seed=run.seed)
    except moepeft.MoepeftError as error:
        return Outcome(**facts, status="unsupported", reason=one_line(error), seconds=time.perf_counter() - start)
    except Exception as error:
        return Outcome(**facts, status="error", reason=one_line(error), seconds=time.perf_counter() - start)
    return Outcome(
        **facts,
        status="diverged" if report.diverged else "ok",
        parameters=report.parameters,
        curve={step: _rounded(shares) for step, shares in report.curve.items()},
        usage={step: tuple(_rounded(row, 4) for row in used.tolist()) for step, used in report.usage.items()},
        swapped=tuple(_rounded(row, 4) for row in report.swapped.tolist()),
        seconds=round(time.perf_counter() - start, 3),
    )


def _rounded(numbers: Iterable[float], digits: int = 6) -> tuple[float, ...]:
    """Six digits, of tables by task and expert four: an archive of thousands of runs stays small."""
    return tuple(round(number, digits) for number in numbers)


class Archive:
    """All outcomes of a results folder: one line of JSON each, appended as they come.

    A process that dies while it writes leaves half a line at the end at most. Reading passes such a line over and
    changes no file. The first writing cuts the line.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._writes = False
        self._outcomes = {outcome.run.id: outcome for outcome in self._read()}

    def find(self, run: Run) -> Outcome | None:
        """The outcome of a run, None if it was not made."""
        return self._outcomes.get(run.id)

    def read(self, run: str) -> Outcome:
        """The outcome of the run of that id, which was made."""
        return self._outcomes[run]

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those of `runs` that were not made, each once."""
        return [run for run in {run.id: run for run in runs}.values() if run.id not in self._outcomes]

    def add(self, outcome: Outcome) -> None:
        """Write one outcome to the end of the archive."""
        self._append(ARCHIVE, outcome.model_dump_json(exclude_defaults=True))
        self._outcomes[outcome.run.id] = outcome

    def note_machine(self, command: str) -> str:
        """Write down code, packages and machine before the first run; gives the hash under which outcomes name them."""
        provenance = gather(torch.device("cpu"), "fp32", command)
        text = provenance.model_dump_json()
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        self._append(MACHINES, json.dumps({"machine": key, **json.loads(text)}))
        return key

    def machines(self) -> dict[str, Provenance]:
        """Provenance by the hash that outcomes name."""
        path = self.root / MACHINES
        lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines() if path.exists() else []
        try:
            loaded = [json.loads(line) for line in lines]
            return {entry.pop("machine"): Provenance.model_validate(entry) for entry in loaded}
        except (ValueError, KeyError) as error:
            raise RecordError(f"{path} is damaged; restore the file, or delete the line that is no JSON") from error

    def _read(self) -> Iterator[Outcome]:
        """Every whole line; a torn last one is no run. Nothing is written: another process may be at work."""
        path = self.root / ARCHIVE
        if not path.exists():
            return
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
        reader = TypeAdapter(Outcome)
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                yield reader.validate_json(line)
            except ValidationError as error:
                raise RecordError(
                    f"line {number} of {path} is damaged; delete the line and give the same command again: its run "
                    "alone is made anew"
                ) from error

    def _append(self, name: str, line: str) -> None:
        if not self._writes:
            self.root.mkdir(parents=True, exist_ok=True)
            self._drop_torn()
            self._writes = True
        with (self.root / name).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def _drop_torn(self) -> None:
        """Cut what a process that died left of a line, so that the next line begins at its beginning."""
        for path in (self.root / ARCHIVE, self.root / MACHINES):
            whole, _, torn = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
            if torn:
                path.write_bytes(whole + b"\n" if whole else b"")
