"""Every method on the accelerator computes what it computes on the CPU; without one, a single method rehearses this."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import moepeft
from tests.support.hosts import batch, build, output

# `python -m benchmarks.gpu` runs these tests where there is a GPU.
pytestmark = [pytest.mark.gpu, pytest.mark.slow]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
METHODS = moepeft.available() if DEVICE.type == "cuda" else ("lora",)
ROWS = 4
TASK_IDS = torch.arange(ROWS) % 3


@pytest.fixture(autouse=True)
def single_precision() -> Iterator[None]:
    """Without TF32, which would differ from the CPU in the fourth digit."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def attached(method: str, host: str) -> tuple[nn.Module, moepeft.Attachment]:
    """Adapters whose values are no start values, in eval mode: nothing is drawn."""
    model = build(host)
    adapters = moepeft.attach(model, moepeft.method(method, num_tasks=3))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.train()  # a method may look at its first batch
    output(model, batch(model, rows=ROWS), task_ids=TASK_IDS)
    return model.eval(), adapters


def compute(model: nn.Module, adapters: moepeft.Attachment, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of a loss that every output and auxiliary loss is in."""
    inputs = {name: value.to(device) for name, value in batch(model, rows=ROWS, padded=2).items()}
    model.zero_grad(set_to_none=True)
    made = output(model, inputs, task_ids=TASK_IDS.to(device))
    (made.float().square().mean() + adapters.aux_loss()).backward()
    # Copies: a gradient moves along with its parameter.
    return made.detach().cpu(), [p.grad.cpu().clone() for p in adapters.parameters() if p.grad is not None]


@pytest.mark.parametrize("host", ["bert", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_are_those_of_the_cpu(method: str, host: str) -> None:
    model, adapters = attached(method, host)
    wanted, gradients = compute(model, adapters, torch.device("cpu"))
    found, others = compute(model.to(DEVICE), adapters, DEVICE)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(others) == len(gradients) > 0
    for other, gradient in zip(others, gradients, strict=True):
        torch.testing.assert_close(other, gradient, rtol=0, atol=1e-3 * float(gradient.abs().max()) + 1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_bfloat16_leaves_finite_weights(method: str) -> None:
    model, adapters = attached(method, "llama")
    model.to(DEVICE).train()
    optimiser = torch.optim.AdamW(adapters.parameters(), lr=1e-3, fused=DEVICE.type == "cuda")
    inputs = {name: value.to(DEVICE) for name, value in batch(model, rows=ROWS).items()}
    before = [parameter.detach().clone() for parameter in adapters.parameters()]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        made = output(model, inputs, task_ids=TASK_IDS.to(DEVICE))
    (made.float().square().mean() + adapters.aux_loss()).backward()
    optimiser.step()
    assert all(parameter.isfinite().all() for parameter in adapters.parameters())
    assert any((old != new).any() for old, new in zip(before, adapters.parameters(), strict=True))
