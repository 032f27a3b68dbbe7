"""Models without values: shapes are computed on the meta device for planning, adapters included."""

from __future__ import annotations

import pytest
import torch

import moepeft
from tests.support.hosts import build


@pytest.mark.parametrize("name", moepeft.available())
def test_forward_and_backward_on_the_meta_device(name: str) -> None:
    model = build("bert").to("meta").train()
    adapters = moepeft.attach(model, moepeft.method(name, num_tasks=2))
    routed = {"task_ids": [0, 1]} if adapters.factory.capabilities.routing == "task" else {}
    state = model(input_ids=torch.zeros(2, 5, dtype=torch.long, device="meta"), **routed).last_hidden_state
    assert state.shape == (2, 5, model.config.hidden_size)
    (state.sum() + adapters.aux_loss()).backward()
    assert all(parameter.grad is None or parameter.grad.is_meta for parameter in adapters.parameters())
