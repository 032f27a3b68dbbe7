"""Teachers are what they say, bounds bound, and students are told apart by what they can express."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moepeft
from benchmarks.mechanisms.students import Lesson, blind_bound, exam, examine, examine_swapped, teach
from benchmarks.mechanisms.teachers import PYRAMID_SCALES, STRUCTURES, Curriculum, Structure, Teacher, make_teacher

SHORT = Lesson(steps=60, warmup=10, rows=32, exams=(30,), exam_rows=64)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_without_conflict_all_tasks_have_one_update(structure: Structure) -> None:
    teacher = make_teacher(Curriculum(structure=structure, tasks=3, conflict=0.0))
    for updates in (teacher.up, teacher.down):
        assert torch.equal(updates[0], updates[1])
        assert updates[2].norm().item() == pytest.approx(2.0, rel=1e-5)
    assert blind_bound(teacher, SHORT) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_teacher_is_decided_by_its_arguments(structure: Structure) -> None:
    one, same, other = (
        make_teacher(Curriculum(structure=structure, tasks=2, conflict=0.5), seed) for seed in (3, 3, 4)
    )
    assert torch.equal(one.up, same.up)
    assert not torch.equal(one.up, other.up)


def test_updates_have_the_structure_they_are_named_after() -> None:
    low = make_teacher(Curriculum(structure="low_rank", tasks=2, conflict=1.0, rank=3))
    assert np.linalg.matrix_rank(low.up[0].numpy(), tol=1e-4) == 3
    nested = make_teacher(Curriculum(structure="nested", tasks=8, conflict=1.0))
    assert [int(np.linalg.matrix_rank(update.numpy(), tol=1e-4)) for update in nested.up] == list(range(1, 9))
    pyramid = make_teacher(Curriculum(structure="pyramid", tasks=8, conflict=1.0, rank=1))
    for task, scale in enumerate(PYRAMID_SCALES):
        # A Kronecker product, rearranged block by block, has rank 1.
        height, width = (side // scale * scale for side in pyramid.up[task].shape)
        blocks = pyramid.up[task][:height, :width].reshape(height // scale, scale, width // scale, scale)
        rearranged = blocks.permute(0, 2, 1, 3).reshape(-1, scale * scale)
        assert np.linalg.matrix_rank(rearranged.numpy(), tol=1e-4) == 1


def test_a_corrected_input_reads_through_one_factor_of_its_rank() -> None:
    teacher = make_teacher(Curriculum(structure="input", tasks=4, conflict=1.0, rank=2))
    assert np.linalg.matrix_rank(torch.cat(list(teacher.up)).numpy(), tol=1e-4) == 2


def test_no_blind_answer_is_above_the_bound() -> None:
    teacher = make_teacher(Curriculum(structure="low_rank", tasks=4, conflict=1.0))
    bound = blind_bound(teacher, SHORT)
    x = exam(teacher, SHORT)
    bare = teacher.host(x)
    right = torch.stack([teacher.answer(x, torch.full((len(x),), task)) for task in range(4)])
    effects = (right - bare).square().flatten(1).mean(dim=1)

    def mean_share(answer: Tensor) -> float:
        return float((1 - (answer - right).square().flatten(1).mean(dim=1) / effects).mean())

    assert 0.1 < bound < 0.5
    for answer in (right.mean(dim=0), right[0], bare, right.median(dim=0).values):
        assert mean_share(answer) <= bound + 1e-6


def test_a_conflict_outside_of_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"conflict=1\.5"):
        make_teacher(Curriculum(structure="low_rank", tasks=2, conflict=1.5))


def test_a_task_blind_student_stays_below_the_bound_and_a_routed_one_does_not() -> None:
    teacher = make_teacher(Curriculum(structure="low_rank", tasks=4, conflict=1.0, width=24, inner=48))
    bound = blind_bound(teacher, SHORT)
    means = {}
    for name in ("lora", "moelora"):
        report = teach(teacher, moepeft.method(name, num_tasks=4), SHORT, rate=1e-2, seed=0)
        assert sorted(report.curve) == [30, 60]
        means[name] = sum(report.curve[60]) / 4
    assert means["lora"] <= bound < means["moelora"]


def test_swapped_ids_hurt_a_routed_student_alone() -> None:
    teacher = make_teacher(Curriculum(structure="low_rank", tasks=4, conflict=1.0, width=24, inner=48))
    blind = teach(teacher, moepeft.method("lora"), SHORT, rate=1e-2, seed=0).swapped
    assert torch.allclose(blind, blind.diagonal()[:, None].expand(4, 4))
    routed = teach(teacher, moepeft.method("moelora", num_tasks=4), SHORT, rate=1e-2, seed=0).swapped
    off = routed[~torch.eye(4, dtype=torch.bool)]
    assert off.max() < routed.diagonal().min()


def test_the_bare_host_explains_nothing() -> None:
    teacher = make_teacher(Curriculum(structure="low_rank", tasks=3, conflict=1.0))
    assert examine_swapped(teacher, Told(teacher.host), SHORT).abs().max() == 0
    assert examine(teacher, Told(teacher.host), SHORT).abs().max() == 0


class Told(torch.nn.Module):
    """A host that is told the task and does not listen."""

    def __init__(self, host: torch.nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, x: Tensor, task_ids: Tensor) -> Tensor:
        return self.host(x)


def test_a_rate_too_high_ends_as_diverged() -> None:
    teacher = make_teacher(Curriculum(structure="low_rank", tasks=2, conflict=1.0, width=24, inner=48))
    report = teach(teacher, moepeft.method("lora"), SHORT, rate=float("inf"), seed=0)
    assert report.diverged
    assert 60 not in report.curve


def test_teacher_start_and_inputs_repeat_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Curriculum(structure="low_rank", tasks=2, conflict=1.0)
    teacher, drawn, attach = make_teacher(plan, 0), [], moepeft.attach
    drawn += [parameter.flatten() for parameter in teacher.host.parameters()]

    def spied(*given: Any) -> Any:
        adapters = attach(*given)
        drawn.extend(parameter.detach().flatten().clone() for parameter in adapters.parameters() if parameter.any())
        return adapters

    answer = Teacher.answer

    def overheard(self: Teacher, x: Tensor, tasks: Tensor) -> Tensor:
        drawn.append(x.flatten())  # of the only step, then of the exam, for every task
        return answer(self, x, tasks)

    monkeypatch.setattr(moepeft, "attach", spied)
    monkeypatch.setattr(Teacher, "answer", overheard)
    teach(teacher, moepeft.method("ept", num_tasks=2), Lesson(steps=1, exams=()), rate=1e-3, seed=0)
    some = torch.stack([values[:256] for values in drawn if len(values) >= 256]).unique(dim=0)
    related = torch.corrcoef(some).fill_diagonal_(0.0).abs()
    assert len(some) > 4
    assert related.max() < 0.35  # of independent draws: 0.06 at one standard deviation
