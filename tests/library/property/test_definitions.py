"""By definitions every method can be differentiated twice, and torch's own checks of derivatives pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import moepeft
from moepeft.registry import factory_class
from tests.library.property.test_fast_paths import plain_case, prepare

SPECS = [f"{name}@{preset}" for name in moepeft.available() for preset in factory_class(name).presets]

# A straight-through estimator's gradient is no derivative: of these parameters finite differences see nothing.
STRAIGHT_THROUGH = {"more@published": ("gate.weight", "gate.bias", "task_embedding")}


@pytest.fixture(autouse=True)
def _by_definitions() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with moepeft.fast_paths(False):
        yield
    torch.set_default_dtype(before)


def without_dropout(spec: str) -> moepeft.AdapterFactory:
    factory = moepeft.method(spec, num_tasks=4)
    return dataclasses.replace(factory, dropout=0.0) if hasattr(factory, "dropout") else factory


@pytest.mark.parametrize("spec", SPECS)
def test_double_backward(spec: str) -> None:
    """The gradient of a gradient's norm reaches every parameter that a plain gradient reaches."""
    model, inputs = prepare(plain_case(without_dropout(spec)))
    adapters = moepeft.attachment(model)
    parameters = dict(adapters.named_parameters())
    loss = model(**inputs).square().mean() + adapters.aux_loss()
    first = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
    reached = [name for name, gradient in zip(parameters, first, strict=True) if gradient is not None]
    norm = torch.stack([gradient.square().sum() for gradient in first if gradient is not None]).sum()
    second = torch.autograd.grad(norm, [parameters[name] for name in reached], allow_unused=True)
    assert [name for name, gradient in zip(reached, second, strict=True) if gradient is None] == []
    assert all(bool(gradient.isfinite().all()) for gradient in second)


@pytest.mark.parametrize("spec", SPECS)
def test_first_and_second_derivatives(spec: str) -> None:
    """Against finite differences, of the output and the auxiliary loss by the input and all parameters."""
    case = {**plain_case(without_dropout(spec)), "depth": 1, "rows": 3, "length": 2}
    model, inputs = prepare(case)
    adapters = moepeft.attachment(model)
    parameters = {
        name: parameter.detach().requires_grad_()
        for name, parameter in adapters.named_parameters()
        if not name.endswith((*STRAIGHT_THROUGH.get(spec, ()), *adapters.factory.capabilities.never_trained))
    }
    places = {key: place for key, place in model.named_parameters() if place.requires_grad}
    named = {id(place): key for key, place in places.items()}
    keys = [named[id(dict(adapters.named_parameters())[name])] for name in parameters]

    def compute(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(
            model, dict(zip(keys, values, strict=True)), (), {**inputs, "x": x}, tie_weights=False
        )
        return torch.cat((output.flatten(), adapters.aux_loss().reshape(1)))

    leaves = (inputs["x"].clone().requires_grad_(), *parameters.values())
    assert torch.autograd.gradcheck(compute, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(compute, leaves, fast_mode=True)
