"""The relatives against what nobody here wrote, where no golden vector covers it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moepeft
from tests.support.hosts import build


def randomised(model: nn.Module, factory: moepeft.AdapterFactory, seed: int = 0) -> moepeft.Attachment:
    """Adapters away from their start."""
    adapters = moepeft.attach(model, factory)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapters


def linear(i: int = 6, o: int = 5) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(i, o)


# ---------------------------------------------------------------------- LoRA per task


def test_lora_per_task_is_a_lora_of_each_task() -> None:
    """Each row equals a plain LoRA that holds the factors of the row's task, itself held to the peft package."""
    model = nn.Sequential(linear())
    adapters = randomised(model, moepeft.method("lora-per-task", rank=2, num_tasks=3))
    own = adapters.state_dict()
    x, tasks = torch.randn(4, 7, 6), [2, 0, 1, 2]
    together: Tensor = model(x, task_ids=tasks)
    for row, task in enumerate(tasks):
        single = nn.Sequential(linear())
        lora = moepeft.attach(single, moepeft.method("lora", rank=2))
        lora.load_state_dict({f"sites.0.{name}": own[f"sites.0.{name}"][task] for name in "AB"})
        assert torch.allclose(together[row], single(x[row]), atol=1e-6)


# ---------------------------------------------------------------------- MoLA


def test_mola_gives_each_stack_its_experts_by_depth() -> None:
    """T5's two stacks count their layers apart; cross-attention stands in the decoder though it reads the encoder."""
    for host in ("t5", "bert"):
        model = build(host)
        adapters = moepeft.attach(model, moepeft.method("mola", allocation=(3, 5), top_k=1))
        found = {site: adapters.adapters[site.name].experts.router.shape[0] for site in adapters.sites}
        assert {site.layer for site in found} == {0, 1}
        assert all(experts == (3, 5)[site.layer] for site, experts in found.items())
