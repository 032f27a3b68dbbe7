"""More tasks for trained adapters: old ones to the bit, new ones that train, files, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moepeft
from moepeft.errors import MissingRouting, Unsupported
from tests.support.hosts import batch, build, output
from tests.support.variants import variants

BY_TASK = {
    label: factory
    for label, factory in variants(2).items()
    if factory.capabilities.routing == "task" and factory.capabilities.batch_first and "@" in label
}
OLD, NEW = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 3, 4, 3])


def trained(factory: Any) -> moepeft.Attachment:
    if getattr(factory, "dropout", 0):
        factory = dataclasses.replace(factory, dropout=0.0)
    adapters = moepeft.attach(build("bert"), factory, sites=["q", "up", "down"])
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapters


@pytest.mark.parametrize("label", BY_TASK)
def test_old_tasks_stay_to_the_bit_and_new_ones_train(label: str, tmp_path: Path) -> None:
    adapters = trained(BY_TASK[label])
    model, inputs = adapters.model, batch(adapters.model, padded=2)
    before = output(model, inputs, task_ids=OLD)
    with pytest.raises(MissingRouting, match="num_tasks=2"):
        output(model, inputs, task_ids=NEW)
    adapters.add_tasks(3)
    assert torch.equal(output(model, inputs, task_ids=OLD), before)
    count = adapters.parameter_count()
    assert count.total == count.closed_form

    old = {name: value.clone() for name, value in adapters.state_dict().items()}
    tables = [name for name, _ in adapters.named_parameters() if old[name].shape[0] == 5]
    optimiser = torch.optim.Adam(adapters.parameters(), lr=2e-3)
    losses, target = [], torch.randn_like(before)
    for _ in range(4):
        loss = (output(model, inputs, task_ids=NEW) - target).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    now = dict(adapters.named_parameters())
    # The frozen selector's table trains by the loss over tasks alone, which an evaluated model does not have.
    moving = [name for name in tables if now[name].grad is not None]
    assert bool(moving) == (label != "more@released")
    assert all(not torch.equal(now[name][2:], old[name][2:]) for name in moving)

    expected = output(model, inputs, task_ids=NEW)
    factory = adapters.factory
    adapters.save(tmp_path)
    adapters.detach()
    again = moepeft.load(model, tmp_path)
    assert again.factory == factory
    assert torch.equal(output(model, inputs, task_ids=NEW), expected)
    again.merge(task=4)
    torch.testing.assert_close(output(model, inputs)[2], expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [48, 768])
@pytest.mark.parametrize("tasks", [1, 7])
@pytest.mark.parametrize("spec", ["ept", "moelora"])
def test_one_more_task_at_true_widths(spec: str, width: int, tasks: int) -> None:
    """Gates come from one product over all tasks, whose number must not show in the old ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width))
    adapters = moepeft.attach(model, moepeft.method(spec, num_tasks=tasks))
    for parameter in adapters.parameters():
        parameter.data.add_(torch.randn(parameter.shape))
    x, ids = torch.randn(5, 3, width), torch.arange(5) % tasks
    before = model(x, task_ids=ids)
    adapters.add_tasks(1)
    assert torch.equal(model(x, task_ids=ids), before)


def test_what_did_not_grow_is_the_same_parameter_in_the_same_precision() -> None:
    adapters = trained(BY_TASK["moelora@published"])
    adapters.model.to(torch.bfloat16)
    before = dict(adapters.named_parameters())
    adapters.add_tasks(1)
    after = dict(adapters.named_parameters())
    assert [name for name in before if before[name] is not after[name]] == ["shared.task_embedding"]
    assert {parameter.dtype for parameter in after.values()} == {torch.bfloat16}
    assert {id(p) for p in after.values()} == {id(p) for p in adapters.model.parameters() if p.requires_grad}


def test_what_cannot_grow_is_refused() -> None:
    adapters = trained(BY_TASK["ept@published"])
    for number in (0, -1, True):
        with pytest.raises(Unsupported, match="whole number"):
            adapters.add_tasks(number)
    adapters.merge(task=0)
    with pytest.raises(Unsupported, match="unmerge"):
        adapters.add_tasks(1)
    adapters.detach()
    with pytest.raises(Unsupported, match="knows no tasks"):
        moepeft.attach(adapters.model, moepeft.method("lora")).add_tasks(1)
