"""Students: a method on the teacher's host, trained on the teacher's answers, and how much of them it explains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

import moepeft
from benchmarks.cells.averaging import WeightAverage
from benchmarks.mechanisms.teachers import FeedForward, Teacher
from benchmarks.protocols.seeds import stream
from moepeft import AdapterFactory, Attachment


@dataclass(frozen=True)
class Lesson:
    """What a student is taught and how: everything but the method, its rate and the seed.

    Attributes:
        steps: of AdamW without decay.
        warmup: steps over which the rate rises; the rate is constant afterwards.
        rows: per step, of tasks drawn at random.
        positions: of a row.
        clip_norm: bound of the gradient norm.
        average: decay of the moving average of the weights that is examined.
        exams: steps after which the student is examined; the last one is `steps`. None: at the end alone, and without
            what stands beside the score, as a trial of a rate is.
        exam_rows: per task.
        first_tasks: if not 0, only this many tasks are taught at first, and only the others afterwards.
        first_steps: how long only the first tasks are taught.
    """

    steps: int = 600
    warmup: int = 50
    rows: int = 64
    positions: int = 4
    clip_norm: float = 1.0
    average: float = 0.98
    exams: tuple[int, ...] = (100, 200, 400, 600)
    exam_rows: int = 256
    first_tasks: int = 0
    first_steps: int = 0

    def __post_init__(self) -> None:
        if (self.first_tasks > 0) != (self.first_steps > 0) or self.first_steps >= self.steps:
            raise ValueError(
                f"first_tasks={self.first_tasks} and first_steps={self.first_steps} of {self.steps} steps: give both, "
                "and steps for the tasks that come later, or neither"
            )

    def with_steps(self, steps: int, *, exams: bool = True) -> Self:
        """The same lesson in another number of steps; the steps of the first tasks keep their share."""
        first = max(1, self.first_steps * steps // self.steps) if self.first_tasks else 0
        kept = (*(exam for exam in self.exams if exam < steps), steps) if exams else ()
        return replace(self, steps=steps, exams=kept, first_steps=first)

    def tasks_at(self, step: int, tasks: int) -> tuple[int, int]:
        """The range of tasks that a step teaches, of so many; steps count from 1."""
        if not self.first_tasks:
            return 0, tasks
        return (0, self.first_tasks) if step <= self.first_steps else (self.first_tasks, tasks)


@dataclass(frozen=True)
class Report:
    """What a student came to.

    Attributes:
        parameters: trainable numbers.
        curve: by number of steps, the explained share (R2) of every task.
        usage: by number of steps, (T, E) the mean gate of every expert on a task's rows, mean over sites; empty for a
            method without gates, and without exams.
        swapped: (T, T) R2 of task row's answers under task column's id, after the last step; (0, 0) without exams.
        diverged: the loss or a gradient was not finite; the curve ends before that.
    """

    parameters: int
    curve: dict[int, tuple[float, ...]]
    usage: dict[int, Tensor]
    swapped: Tensor
    diverged: bool = False


class Divergence(RuntimeError):
    """A loss or a gradient is not finite."""


def teach(teacher: Teacher, factory: AdapterFactory, lesson: Lesson, *, rate: float, seed: int) -> Report:
    """Train one student and examine it.

    Args:
        teacher: with the tasks.
        factory: of the method, configured for as many tasks.
        lesson: how it is trained.
        rate: of AdamW.
        seed: of the adapters, the inputs and the tasks' order.
    """
    host = copy.deepcopy(teacher.host)
    torch.manual_seed(stream("student", seed))  # the starts here, and dropout later
    adapters = moepeft.attach(host, factory)
    averaged = WeightAverage(list(adapters.parameters()), lesson.average)
    parameters = sum(parameter.numel() for parameter in adapters.parameters())
    curve: dict[int, tuple[float, ...]] = {}
    usage: dict[int, Tensor] = {}
    swapped = torch.full((teacher.tasks, teacher.tasks), float("nan")) if lesson.exams else torch.empty(0, 0)
    diverged = False
    try:
        for step in _steps(teacher, host, adapters, lesson, rate, seed):
            averaged.update()
            if step in lesson.exams or step in (lesson.first_steps, lesson.steps):
                with averaged.applied():
                    curve[step] = tuple(examine(teacher, host, lesson).tolist())
                    used = expert_usage(teacher, adapters, lesson) if lesson.exams else None
                    usage |= {} if used is None else {step: used}
                    if lesson.exams and step == lesson.steps:
                        swapped = examine_swapped(teacher, host, lesson)
    except Divergence:
        diverged = True
    return Report(parameters, curve, usage, swapped, diverged)


def _steps(
    teacher: Teacher, host: nn.Module, adapters: Attachment, lesson: Lesson, rate: float, seed: int
) -> Iterator[int]:
    """Train, step by step; gives the number of steps made."""
    trained = list(adapters.parameters())
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / lesson.warmup))
    draw = torch.Generator().manual_seed(stream("inputs", seed))
    host.train()
    for step in range(1, lesson.steps + 1):
        x = torch.randn(lesson.rows, lesson.positions, _width(teacher), generator=draw)
        tasks = torch.randint(*lesson.tasks_at(step, teacher.tasks), (lesson.rows,), generator=draw)
        error = (host(x, task_ids=tasks) - teacher.answer(x, tasks)).square().mean()
        (error + adapters.aux_loss()).backward()
        norm = nn.utils.clip_grad_norm_(trained, lesson.clip_norm)
        if not (torch.isfinite(error) and torch.isfinite(norm)):
            raise Divergence
        optimiser.step()
        adapters.after_step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        yield step
        host.train()


# ---------------------------------------------------------------------- exams


def examine(teacher: Teacher, host: nn.Module, lesson: Lesson) -> Tensor:
    """R2 of every task: the share of the update's effect that the student explains; 1 is all, 0 the bare host's."""
    return torch.diagonal(examine_swapped(teacher, host, lesson, own_only=True))


@torch.no_grad()
def examine_swapped(teacher: Teacher, host: nn.Module, lesson: Lesson, *, own_only: bool = False) -> Tensor:
    """(T, T): R2 of the answers of the row's task when the student is told the column's id.

    Args:
        teacher: whose answers are right.
        host: the student.
        lesson: how many rows an exam has.
        own_only: leave everything but the diagonal at NaN.
    """
    host.eval()
    table = torch.full((teacher.tasks, teacher.tasks), float("nan"))
    x = exam(teacher, lesson)
    bare = teacher.host(x)
    for task in range(teacher.tasks):
        right = teacher.answer(x, torch.full((len(x),), task))
        effect = (right - bare).square().mean()
        for told in (task,) if own_only else range(teacher.tasks):
            given = host(x, task_ids=torch.full((len(x),), told))
            table[task, told] = 1 - (given - right).square().mean() / effect
    return table


@torch.no_grad()
def expert_usage(teacher: Teacher, adapters: Attachment, lesson: Lesson) -> Tensor | None:
    """(T, E): how much each task's rows use each expert, mean over sites; None if no site has gates."""
    adapters.model.eval()
    x = exam(teacher, lesson)
    used = []
    for task in range(teacher.tasks):
        with adapters.recording() as statistics:
            adapters.model(x, task_ids=torch.full((len(x),), task))
        gates = [site["gates"] for site in statistics.values() if "gates" in site]
        if not gates or len({gate.shape[-1] for gate in gates}) > 1:
            return None
        used.append(torch.stack([gate.flatten(0, -2).mean(dim=0) for gate in gates]).mean(dim=0))
    return torch.stack(used)


@torch.no_grad()
def blind_bound(teacher: Teacher, lesson: Lesson) -> float:
    """The highest mean R2 that any function of the input alone can reach, on the exam's own rows.

    R2 divides each task's squared error by the size of the task's effect. The answer that is best for the mean of
    these ratios is, at every input, the mean of the tasks' answers, each weighed by one over its effect's size.
    """
    x = exam(teacher, lesson)
    bare = teacher.host(x)
    answers = torch.stack([teacher.answer(x, torch.full((len(x),), task)) for task in range(teacher.tasks)])
    effects = (answers - bare).square().flatten(1).mean(dim=1)
    weights = (1 / effects) / (1 / effects).sum()
    errors = (torch.einsum("t,t...->...", weights, answers) - answers).square().flatten(1).mean(dim=1)
    return float((1 - errors / effects).mean())


def exam(teacher: Teacher, lesson: Lesson) -> Tensor:
    """The inputs of an exam: the same for all students and seeds, and never seen in training."""
    draw = torch.Generator().manual_seed(stream("exam"))
    return torch.randn(lesson.exam_rows, lesson.positions, _width(teacher), generator=draw)


def _width(teacher: Teacher) -> int:
    host: FeedForward = teacher.host
    return host.up_proj.in_features
