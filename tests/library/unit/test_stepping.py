"""`after_step`: what training forwards count reaches the adapters once per optimiser step, and never twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moepeft
from moepeft.config import MethodConfig
from moepeft.context import SiteContext
from moepeft.errors import MissingStep
from moepeft.protocols import Base, LinearSite


@dataclass(frozen=True, kw_only=True)
class Counting(MethodConfig):
    """Adds a trained number to a layer's output and counts the rows that it sees."""

    name: ClassVar[str] = "counting"

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        return CountingAdapter()

    def count(self, sites: Sequence[LinearSite]) -> int:
        return len(sites)


class CountingAdapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))
        self.seen: list[float] = []

    def forward(self, x: Tensor, base: Base, ctx: SiteContext) -> Tensor:
        if self.training:
            ctx.tally(torch.full((2,), float(x.shape[0])))
        return base(x) + self.shift

    def after_step(self, counts: Tensor) -> None:
        self.seen.append(float(counts[0]))


class Checkpointed(nn.Module):
    """Two layers, recomputed during backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def train(model: nn.Module, adapters: moepeft.Attachment, *rows: int) -> None:
    """One optimiser step over some batches."""
    optimiser = torch.optim.SGD(adapters.parameters(), lr=0.1)
    for number in rows:
        model(torch.randn(number, 3, requires_grad=True)).square().mean().backward()
    optimiser.step()


def seen(adapters: moepeft.Attachment) -> Iterator[list[float]]:
    for adapter in adapters.adapters.values():
        assert isinstance(adapter, CountingAdapter)
        yield adapter.seen


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).train()


def test_accumulated_batches_count_together_and_steps_apart(model: nn.Module) -> None:
    adapters = moepeft.attach(model, Counting())
    train(model, adapters, 4, 5, 6)
    adapters.after_step()
    train(model, adapters, 7)
    adapters.after_step()
    adapters.after_step()  # nothing was counted since
    assert list(seen(adapters)) == [[15.0, 7.0]] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_counts_once(reentrant: bool) -> None:
    model = Checkpointed(reentrant).train()
    adapters = moepeft.attach(model, Counting())
    train(model, adapters, 4, 5)
    adapters.after_step()
    assert list(seen(adapters)) == [[9.0]] * 2


def test_evaluation_and_forwards_without_gradient_do_not_count(model: nn.Module) -> None:
    adapters = moepeft.attach(model, Counting())
    model.eval()(torch.randn(4, 3))
    with torch.no_grad():
        model.train()(torch.randn(5, 3))
    adapters.after_step()
    assert list(seen(adapters)) == [[]] * 2


def test_a_forgotten_call_is_refused(model: nn.Module) -> None:
    adapters = moepeft.attach(model, Counting())
    train(model, adapters, 4)
    model.eval()(torch.randn(2, 3))  # evaluation does not need it
    with pytest.raises(MissingStep, match=r"after_step\(\)"):
        model.train()(torch.randn(4, 3))
    adapters.after_step()
    train(model, adapters, 4)


def test_new_values_forget_what_was_counted_of_the_old(model: nn.Module) -> None:
    adapters = moepeft.attach(model, Counting())
    train(model, adapters, 4)
    adapters.load_state_dict(adapters.state_dict())
    train(model, adapters, 5)
    adapters.reset_parameters()
    train(model, adapters, 6)
    adapters.after_step()
    assert list(seen(adapters)) == [[6.0]] * 2


def test_methods_that_count_nothing_need_no_call(model: nn.Module) -> None:
    adapters = moepeft.attach(model, moepeft.method("lora", rank=2))
    for _ in range(2):
        train(model, adapters, 4)
    adapters.after_step()


def test_each_layer_gets_its_sum_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one model on several devices, and a layer that was moved after it had counted."""
    got: dict[str, Tensor] = {}
    monkeypatch.setattr(
        CountingAdapter, "after_step", lambda self, counts: got.update({self.shift.device.type: counts})
    )
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    adapters = moepeft.attach(model, Counting())
    for _ in range(2):
        model.train()(torch.ones(4, 3))
    adapters.adapters["1"].to("meta")
    adapters.after_step()
    assert {device: counts.device.type for device, counts in got.items()} == {"cpu": "cpu", "meta": "meta"}
    assert got["cpu"].tolist() == [8.0, 8.0]
