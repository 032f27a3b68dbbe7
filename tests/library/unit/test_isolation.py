"""Adapters of one model know nothing of another's, in one thread or two; routes nest and end as they began."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

import moepeft
from moepeft.errors import MissingRouting
from tests.support.hosts import batch, build, output

SPECS = ["ept", "moelora", "more", "mixlora", "tucka"]


def adapted(spec: str, host: str = "llama", seed: int = 0) -> moepeft.Attachment:
    model = build(host, seed)
    adapters = moepeft.attach(model, moepeft.method(spec, num_tasks=4))
    output(model, batch(model, seed=seed), task_ids=torch.zeros(4, dtype=torch.long))
    for parameter in adapters.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return adapters


def train(adapters: moepeft.Attachment, task: int, seed: int) -> dict[str, Tensor]:
    """Output and gradients of a training step, auxiliary losses included."""
    model = adapters.model.train()
    with adapters.route(task_ids=task):
        result = output(model, batch(model, seed=seed))
    (result.square().mean() + adapters.aux_loss()).backward()
    gradients = {name: p.grad.clone() for name, p in adapters.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"output": result.detach(), **gradients}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("spec", SPECS)
def test_two_threads_that_meet_in_the_middle_of_every_forward(spec: str) -> None:
    """Both models are inside their forwards, between two adapted layers, at the same time."""
    models = [adapted(spec, seed=seed) for seed in range(2)]
    expected = [train(adapters, task=1 + seed, seed=seed) for seed, adapters in enumerate(models)]
    meeting = threading.Barrier(2, timeout=60)
    with ExitStack() as stack:
        for adapters in models:
            for layer in adapters.model.model.layers:
                handle = layer.mlp.register_forward_pre_hook(lambda *_: (meeting.wait(), None)[1])
                stack.callback(handle.remove)
        with ThreadPoolExecutor(2) as pool:
            tasks = [pool.submit(train, adapters, 1 + seed, seed) for seed, adapters in enumerate(models)]
            found = [task.result(timeout=120) for task in tasks]
    for got, wanted in zip(found, expected, strict=True):
        assert_same(got, wanted)


def test_one_model_called_inside_another() -> None:
    """A frozen teacher, asked in the middle of the student's forward, with its own route."""
    student, teacher = adapted("moelora"), adapted("ept", "bert", seed=1)
    expected = train(student, 2, 0)
    answer = output(teacher.model, batch(teacher.model), task_ids=torch.full((4,), 3))
    answers = []

    def ask(*_: object) -> None:
        with torch.no_grad(), teacher.route(task_ids=[3, 3, 3, 3]):
            answers.append(output(teacher.model, batch(teacher.model)))

    handle = student.model.model.layers[0].mlp.register_forward_pre_hook(ask)
    found = train(student, 2, 0)
    handle.remove()
    assert_same(found, expected)
    assert torch.equal(answers[0], answer)


def test_adapters_of_one_model_leave_another_of_the_same_class_alone() -> None:
    plain, other = build("bert"), build("bert")
    inputs = batch(plain)
    expected = output(plain, inputs)
    adapters = moepeft.attach(other, moepeft.method("mixlora"))
    with adapters.disabled(), adapters.recording():
        assert torch.equal(output(plain, inputs), expected)
    assert torch.equal(output(plain, inputs), expected)
    assert not any("moepeft" in name for name, _ in plain.named_modules())
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in plain.modules())
    assert all("forward" not in vars(type(module)) or type(module) is not nn.Linear for module in other.children())
    assert nn.Linear.forward.__module__ == "torch.nn.modules.linear"


def test_routes_nest_and_the_inner_one_ends_with_its_block() -> None:
    adapters = adapted("moelora")
    model, inputs = adapters.model, batch(adapters.model)
    expected = [output(model, inputs, task_ids=torch.full((4,), task)) for task in range(3)]
    with adapters.route(task_ids=0):
        assert torch.equal(output(model, inputs), expected[0])
        with adapters.route(task_ids=[1, 1, 1, 1]):
            assert torch.equal(output(model, inputs), expected[1])
            assert torch.equal(output(model, inputs, task_ids=torch.full((4,), 2)), expected[2])  # the call wins
            assert torch.equal(output(model, inputs), expected[1])
        assert torch.equal(output(model, inputs), expected[0])
    with pytest.raises(MissingRouting):
        output(model, inputs)


class Failed(Exception):
    """Whatever goes wrong in the user's own code."""


def test_an_exception_inside_a_route_restores_what_was_before() -> None:
    adapters = adapted("moelora")
    model, inputs = adapters.model, batch(adapters.model)
    expected = output(model, inputs, task_ids=torch.zeros(4, dtype=torch.long))
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Failed()))
    with adapters.route(task_ids=0):
        with pytest.raises(Failed), adapters.route(task_ids=3), adapters.disabled(), adapters.recording():
            output(model, inputs)
        handle.remove()
        assert torch.equal(output(model, inputs), expected)
        with pytest.raises(MissingRouting, match="num_tasks=4"), adapters.route(task_ids=4):
            pass
        assert torch.equal(output(model, inputs), expected)
    settings = adapters.runtime.settings
    assert settings.task_ids is None
    assert settings.enabled
    assert settings.stats is None
    with pytest.raises(MissingRouting):
        output(model, inputs)
