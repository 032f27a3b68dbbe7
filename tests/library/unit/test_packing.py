"""Packed rows: sequences of several tasks that stand one after the other in a row, beside the same sequences apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moepeft
from moepeft.errors import MissingRouting
from tests.support.hosts import batch, build, output
from tests.support.variants import variants

# (task, length) of the sequences of each row; the second row ends in two positions of padding.
ROWS = [[(0, 3), (0, 4), (2, 2)], [(1, 5), (2, 2)]]
LENGTH = 9
# Presets, and what they leave out of how a row is summed up.
BY_TASK = {
    label: factory
    for label, factory in variants(3).items()
    if factory.capabilities.routing == "task" and factory.capabilities.batch_first
    if "@" in label or "anchor" in label
}


def packed() -> tuple[dict[str, Tensor], Tensor, list[tuple[slice, int, int]]]:
    """Inputs of a LLaMA with a block-diagonal mask, task ids by position, and place, row and task of sequences."""
    ids, tasks, positions = (torch.zeros(len(ROWS), LENGTH, dtype=torch.long) for _ in range(3))
    mask = torch.zeros(len(ROWS), 1, LENGTH, LENGTH, dtype=torch.bool)
    ids.random_(3, 64, generator=torch.Generator().manual_seed(3))
    places = []
    for row, sequences in enumerate(ROWS):
        start = 0
        for task, length in sequences:
            place = slice(start, start + length)
            tasks[row, place], positions[row, place] = task, torch.arange(length)
            mask[row, 0, place, place] = torch.ones(length, length).tril().bool()
            places.append((place, row, task))
            start += length
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, tasks, places


def adapted(factory: Any) -> moepeft.Attachment:
    if getattr(factory, "dropout", 0):
        factory = dataclasses.replace(factory, dropout=0.0)
    model: Any = build("llama").double()
    del model.model.layers[1:]
    adapters = moepeft.attach(model, factory)
    model.double().train()
    torch.manual_seed(1)
    for parameter in adapters.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    return adapters


def gradients(adapters: moepeft.Attachment, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, [*adapters.parameters()], allow_unused=True)
    names = [name for name, _ in adapters.named_parameters()]
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


@pytest.mark.parametrize("label", BY_TASK)
@pytest.mark.parametrize("fast", [True, False])
def test_packed_rows_equal_sequences_apart(label: str, fast: bool) -> None:
    adapters = adapted(BY_TASK[label])
    inputs, tasks, places = packed()
    with moepeft.fast_paths(fast):
        logits = adapters.model(**inputs, task_ids=tasks).logits
        together = torch.cat([logits[row, place] for place, row, _ in places])
        aux = adapters.aux_loss()
        of_packed = gradients(adapters, together.square().sum() + aux)

        # The same sequences one row each, padded to the longest.
        longest = max(place.stop - place.start for place, _, _ in places)
        ids, mask = (torch.zeros(len(places), longest, dtype=torch.long) for _ in range(2))
        for i, (place, row, _) in enumerate(places):
            ids[i, : place.stop - place.start], mask[i, : place.stop - place.start] = inputs["input_ids"][row, place], 1
        logits = adapters.model(input_ids=ids, attention_mask=mask, task_ids=[task for _, _, task in places]).logits
        apart = logits[mask.bool()]
        of_apart = gradients(adapters, apart.square().sum() + adapters.aux_loss())
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(aux, adapters.aux_loss(), rtol=1e-10, atol=1e-12)
    assert of_packed.keys() == of_apart.keys()
    for name, grad in of_apart.items():
        torch.testing.assert_close(of_packed[name], grad, rtol=1e-9, atol=1e-10, msg=name)


def test_recomputed_blocks_see_the_same_packed_rows() -> None:
    adapters = adapted(BY_TASK["ept@published"])
    inputs, tasks, _ = packed()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model: Any = adapters.model
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logits = adapters.model(**inputs, task_ids=tasks, use_cache=False).logits
        found.append(gradients(adapters, logits.square().mean() + adapters.aux_loss()))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-10, atol=1e-12)


def test_rows_of_dimension_1_are_packed_as_well() -> None:
    """ChatGLM's layout, (positions, rows, features)."""
    torch.manual_seed(0)
    adapters = moepeft.attach(nn.Sequential(nn.Linear(6, 6)), moepeft.method("moelora", num_tasks=3, rank=8))
    turned = moepeft.attach(
        nn.Sequential(nn.Linear(6, 6)), moepeft.method("moelora", num_tasks=3, rank=8, layout="sequence_first")
    )
    for parameter in adapters.parameters():
        parameter.data.normal_()
    turned.model.load_state_dict(adapters.model.state_dict())
    x, ids = torch.randn(2, 5, 6), torch.randint(3, (2, 5))
    there = turned.model(x.transpose(0, 1), task_ids=ids).transpose(0, 1)
    torch.testing.assert_close(adapters.model(x, task_ids=ids), there)


def test_statistics_of_packed_rows_have_rows_and_positions() -> None:
    adapters = adapted(BY_TASK["mtl-lora@published"])
    inputs, tasks, _ = packed()
    with adapters.recording() as stats:
        adapters.model(**inputs, task_ids=tasks)
    site: Any = adapters.adapters["model.layers.0.mlp.up_proj"]
    by_task = site.mixture()
    torch.testing.assert_close(stats["model.layers.0.mlp.up_proj"]["gates"], by_task[tasks].detach())


def test_what_packed_rows_cannot_be_is_refused() -> None:
    adapters = adapted(BY_TASK["ept@published"])
    inputs, tasks, _ = packed()
    with pytest.raises(MissingRouting, match=r"\(2, 8\)"):
        adapters.model(**inputs, task_ids=tasks[:, 1:])
    where = inputs.pop("position_ids")
    with pytest.raises(MissingRouting, match="position_ids"):
        adapters.model(**inputs, task_ids=tasks)
    adapters.model.eval()
    adapters.model(**inputs, position_ids=where, task_ids=tasks)
    t5: Any = build("t5")
    of_two = moepeft.attach(t5, moepeft.method("moelora", num_tasks=3))
    with pytest.raises(MissingRouting, match="encoder-decoder"):
        output(of_two.model, batch(t5), task_ids=torch.zeros(4, 7, dtype=torch.long))
