"""Fully sharded data parallelism (FSDP2) on two processes: the gradients and the saved adapters of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import moepeft
from moepeft.errors import Unsupported
from tests.library.distributed.test_ddp import (
    HALVES,
    IDS,
    JOINT,
    SPECS,
    away_from_start,
    difference,
    make,
    without_dropout,
)
from tests.support.asked import asked
from tests.support.hosts import batch, build, output, rows_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"),
]
PROCESSES = 2


def sharded(spec: str) -> tuple[nn.Module, moepeft.Attachment]:
    """As values are there."""
    model, adapters = away_from_start("llama", spec)
    shard(model, adapters)
    return model, adapters


def sharded_without_memory(spec: str, saved: Path) -> tuple[nn.Module, moepeft.Attachment]:
    """As a model is made that fits in no single device's memory, and adapters saved before are put on it."""
    whole_one, of_whole = away_from_start("llama", spec)
    of_whole.save(saved)
    with torch.device("meta"):
        model = build("llama")
    adapters = moepeft.attach(model, make(spec))
    without_dropout(model)
    shard(model.double().train(), adapters)
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, of_whole.detach().state_dict(), options=options)
    for name, buffer in whole_one.named_buffers():  # transformers' own, in no state dict
        model.get_buffer(name).copy_(buffer)
    adapters.reset_parameters()
    check_same_on_all(adapters)
    adapters.restore(saved)
    return model, adapters


def check_same_on_all(adapters: moepeft.Attachment) -> None:
    """Every process draws its own numbers; those of the first stand on all."""
    for name, value in adapters.state_dict().items():
        full = whole(value).double()
        first = full.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(full, first), name
        if name.endswith(".A"):
            assert full.std() > 0


def shard(model: nn.Module, adapters: moepeft.Attachment) -> None:
    """Every layer a group of its own, as one would shard a large model."""
    adapters.synchronise()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    if adapters.shared is not None and any(True for _ in adapters.shared.parameters()):
        # What all layers share lives at the first adapted one, which is sharded again before the others run.
        fully_shard(adapters.shared, mesh=mesh, reshard_after_forward=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def step(model: nn.Module, adapters: moepeft.Attachment, rows: list[int], seed: int) -> dict[str, Tensor]:
    """Gradients of one optimiser step over some rows of a batch."""
    optimiser = torch.optim.SGD(adapters.parameters(), lr=0.01)
    if isinstance(adapters.shared, FSDPModule):
        adapters.shared.unshard()
    result = output(model, rows_of(batch(model, rows=8, padded=3, seed=seed), rows), task_ids=IDS[rows])
    (result[..., ::2].square().mean() + adapters.aux_loss()).backward()
    seen = {name: whole(p.grad) for name, p in adapters.named_parameters() if p.grad is not None}
    optimiser.step()
    adapters.after_step()
    optimiser.zero_grad()
    return seen


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def process(rank: int, folder: str, specs: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    found: dict[str, Any] = {}
    for spec in specs:
        other, of_other = sharded_without_memory(spec, Path(folder) / f"rank{rank}" / spec)
        found[f"{spec} restored"] = [step(other, of_other, HALVES[rank], seed) for seed in range(2)]
        model, adapters = sharded(spec)
        # A parameter of one row lies whole with one of the processes: rows are what is split.
        split = [
            p for p in model.parameters() if isinstance(p, DTensor) and len(p.to_local()) <= -(-len(p) // PROCESSES)
        ]
        found[f"{spec} split"] = len(split) / len(list(model.parameters()))
        found[f"{spec} gradients"] = [step(model, adapters, HALVES[rank], seed) for seed in range(2)]
        adapters.save(f"{folder}/{spec}")
        dist.barrier()
    with pytest.raises(Unsupported, match="attach first"):
        moepeft.attach(fully_shard(build("llama")), make("lora"))
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(process, args=(str(folder), [spec for (spec,) in asked(request, "spec")]), nprocs=PROCESSES)
    return folder, [torch.load(folder / f"rank{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("spec", SPECS)
def test_sharded_processes_have_the_gradients_of_one(spec: str, ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = ranks
    model, adapters = away_from_start("llama", spec)
    expected = [step(model, adapters, *JOINT, seed) for seed in range(2)]
    for rank in found:
        assert rank[f"{spec} split"] == 1.0
        assert difference(rank[f"{spec} gradients"], expected) < 1e-10
        assert difference(rank[f"{spec} restored"], expected) < 1e-10

    torch.set_default_dtype(torch.float64)
    try:
        fresh, _ = away_from_start("llama", spec)
        # Its first values were drawn in double precision: they are others.
        again = moepeft.load(moepeft.attachment(fresh).detach(), folder / spec, any_base=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in adapters.state_dict().items():
        assert torch.allclose(again.state_dict()[name], value, atol=1e-10), name
