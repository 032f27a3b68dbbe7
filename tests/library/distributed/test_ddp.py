"""Data parallelism on two processes: the gradients of one, and the same state on both, without looking for unused
parameters.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import moepeft
from moepeft.registry import factory_class
from tests.support.asked import asked
from tests.support.hosts import batch, build, output, rows_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"),
]

TASKS, RANKS, STEPS = 3, 2, 2
IDS = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1])
HALVES = [[0, 1, 2, 4], [6, 3, 5, 7]]  # one has more padding than the other
HOSTS = ("bert", "t5")

Gradients = list[dict[str, Tensor]]


def make(spec: str) -> moepeft.AdapterFactory:
    return moepeft.method(spec, num_tasks=TASKS)


SPECS = [
    spec
    for spec in dict.fromkeys(
        f"{name}@{preset}" for name in moepeft.available() for preset in factory_class(name).presets
    )
    if make(spec).capabilities.batch_first and (spec == "lora@published" or not spec.startswith("lora@"))
]
CASES = [(host, spec) for host in HOSTS for spec in SPECS]


def looks_across_rows(spec: str) -> bool:
    capabilities = make(spec).capabilities
    return not capabilities.row_independent or "balance" in capabilities.aux_losses


JOINT = [list(chain(*HALVES))]
ACROSS_ROWS = [(host, spec) for host, spec in CASES if looks_across_rows(spec)]


def attached(host: str, spec: str) -> tuple[nn.Module, moepeft.Attachment]:
    """Freshly attached, without dropout: its masks would differ between processes."""
    model = build(host)
    torch.manual_seed(1)
    adapters = moepeft.attach(model, make(spec))
    without_dropout(model)
    return model.double().train(), adapters


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # attention's own
            module.dropout = 0.0


def away_from_start(host: str, spec: str) -> tuple[nn.Module, moepeft.Attachment]:
    """The same on every process: data-aware starts are over, and no parameter is zero."""
    model, adapters = attached(host, spec)
    with torch.no_grad():
        output(model, batch(model, rows=8), task_ids=IDS)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapters.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model, adapters


def train(call: nn.Module, adapters: moepeft.Attachment, parts: list[list[int]]) -> Gradients:
    """Gradients of some optimiser steps, each over the parts of a batch one after the other."""
    seen = []
    optimiser = torch.optim.SGD(adapters.parameters(), lr=0.01)
    for step in range(STEPS):
        optimiser.zero_grad()
        inputs = batch(adapters.model, rows=8, padded=3, seed=step)
        for part in parts:
            result = output(call, rows_of(inputs, part), task_ids=IDS[part])
            loss = result[..., ::2].square().mean() + adapters.aux_loss()
            (loss / len(parts)).backward()
        seen.append({name: p.grad.clone() for name, p in adapters.named_parameters() if p.grad is not None})
        optimiser.step()
        adapters.after_step()
    return seen


def difference(got: Gradients, wanted: Gradients) -> float:
    """The largest one; a parameter without a gradient has one of zero."""
    assert all(set(other) <= set(one) for one, other in zip(got, wanted, strict=True))
    return max(
        float((value - other.get(name, torch.zeros(()))).abs().max())
        for one, other in zip(got, wanted, strict=True)
        for name, value in one.items()
    )


def process(rank: int, folder: str, cases: list[tuple[str, str]]) -> None:
    """One of the two: its half of every batch, in every case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for host, spec in cases:
        model, adapters = away_from_start(host, spec)
        found[f"{host} {spec} gradients"] = train(DistributedDataParallel(model), adapters, [HALVES[rank]])
        model, adapters = attached(host, spec)
        train(DistributedDataParallel(model), adapters, [HALVES[rank]])
        found[f"{host} {spec} state"] = adapters.state_dict()
    for host, spec in [case for case in cases if case in ACROSS_ROWS]:
        model, adapters = away_from_start(host, spec)
        adapters.synchronise()
        found[f"{host} {spec} joint"] = train(DistributedDataParallel(model), adapters, [HALVES[rank]])
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found, in all cases of the session: starting them takes longer than what they do."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(process, args=(str(folder), asked(request, "host", "spec")), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(("host", "spec"), CASES)
def test_two_processes_have_the_gradients_of_one(host: str, spec: str, ranks: list[dict[str, Any]]) -> None:
    """Of one with the joint batch; of one that goes through the halves in turn where a method looks across rows.

    Routing by the batch's mean, and a balance loss over the batch's tokens, differ between a batch and its halves.
    """
    model, adapters = away_from_start(host, spec)
    expected = train(model, adapters, HALVES if looks_across_rows(spec) else JOINT)
    for rank in ranks:
        assert difference(rank[f"{host} {spec} gradients"], expected) < 1e-10


@pytest.mark.parametrize(("host", "spec"), ACROSS_ROWS)
def test_synchronised_processes_have_the_gradients_of_the_joint_batch(
    host: str, spec: str, ranks: list[dict[str, Any]]
) -> None:
    model, adapters = away_from_start(host, spec)
    expected = train(model, adapters, JOINT)
    for rank in ranks:
        assert difference(rank[f"{host} {spec} joint"], expected) < 1e-10
        assert difference(rank[f"{host} {spec} gradients"], expected) > 1e-7  # there is something to synchronise


@pytest.mark.parametrize(("host", "spec"), CASES)
def test_both_processes_go_on_from_the_same_state(host: str, spec: str, ranks: list[dict[str, Any]]) -> None:
    """Freshly attached: what a method draws from its first batch is the same on both."""
    one, two = (rank[f"{host} {spec} state"] for rank in ranks)
    assert set(one) == set(two)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
