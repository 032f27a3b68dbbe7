"""What is made for all sites at once: the same numbers as site by site, and no gradient where nothing ran."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import moepeft
from moepeft.fast import fast_paths
from moepeft.ops.together import Together
from tests.support.hosts import batch, build, output

SPECS = ["ept", "more", "tucka", "moelora", "moelora@per_site", "ept@released", "more@released"]
IDS = torch.tensor([0, 1, 2, 0])


def test_stacked_and_apart() -> None:
    tensors = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    together = Together(3)
    others = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    all_three, two = together.stack(dict(enumerate(tensors)), {0: others[0], 1: others[1]})
    parts, more = together.apart((range(3), all_three.square()), ((0, 1), two.exp()))
    (parts[0].sum() + 2 * parts[2].sum() + more[0].sum()).backward()
    first, unused, last = (tensor.grad for tensor in tensors)
    assert unused is None
    assert others[1].grad is None
    assert others[0].grad is not None
    assert torch.equal(others[0].grad, others[0].exp())
    assert first is not None
    assert last is not None
    assert torch.equal(first, 2 * tensors[0])
    assert torch.equal(last, 4 * tensors[2])


class Skipping(nn.Module):
    """Three layers of one shape, of which a call may leave one out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, skip: int) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = x if number == skip else layer(x).tanh()
        return x


@pytest.mark.parametrize("spec", SPECS)
def test_a_layer_that_does_not_run_has_no_gradient(spec: str) -> None:
    """As by definitions, which know nothing of other sites; an optimiser would move what has a gradient of zero."""
    model = Skipping()
    moepeft.attach(model, moepeft.method(spec, num_tasks=3))
    x = torch.randn(4, 5, 16)
    model(x, -1, task_ids=IDS)  # what looks at a first batch does so now
    reached = []
    for wanted in (True, False):
        twin = copy.deepcopy(model)
        adapters = moepeft.attachment(twin)
        with fast_paths(wanted):
            (twin(x, 1, task_ids=IDS).square().sum() + adapters.aux_loss()).backward()
        reached.append({name for name, parameter in adapters.named_parameters() if parameter.grad is not None})
    assert reached[0] == reached[1]
    assert any("layers.0." in name for name in reached[0])
    assert not any("layers.1." in name for name in reached[0])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("spec", ["ept", "more", "tucka", "moelora"])
def test_checkpointed_blocks_give_the_same_gradients(spec: str, reentrant: bool) -> None:
    model = build("llama").double().train()
    factory = moepeft.method(spec, num_tasks=3)
    if hasattr(factory, "contrastive"):  # a loss cannot come out of a reentrant block
        factory = moepeft.method(spec, num_tasks=3, contrastive=0.0)
    adapters = moepeft.attach(model, factory)
    model.double()
    torch.manual_seed(0)
    inputs = batch(model)
    output(model, inputs, task_ids=IDS)
    for parameter in adapters.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        output(model, inputs, task_ids=IDS).square().mean().backward()
        found.append({name: p.grad for name, p in adapters.named_parameters() if "centroids" not in name})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)
