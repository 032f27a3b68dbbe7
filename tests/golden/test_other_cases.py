"""The replayer reads any kernels, ranks and numbers of chosen experts, not only those of the stored cases.

Each case here is computed by the dense update of the release's formula, put beside every linear layer of a T5 by
hooks: W_e[c s + j, b] = K_e[c, j] (B[:out // s] A[:, :in // s])[c, b].
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.golden import replay
from tests.golden.whole import build
from tests.golden.whole_plans import WholeCase

STORED = Path(__file__).parent / "whole" / "ept_t5_task3.json"
OTHERS = [((4, 4, 4, 4, 8, 8, 12, 12), 16, 1), ((3, 3, 4, 5, 6, 7, 8, 9), 4, 3), ((9, 3, 2, 8), 8, 4)]


def draw(layers: dict[str, nn.Linear], kernels: tuple[int, ...], rank: int, tasks: int) -> dict[str, Tensor]:
    """Parameters of every layer, under the names of a case."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        i, o = layer.in_features, layer.out_features
        parts = {"A": (rank, i // 2), "B": (o // 2, rank), "task_embedding": (tasks, i)}
        parts |= {"gate.weight": (len(kernels), i), "gate.bias": (len(kernels),)}
        parts |= {f"kernel.{e}": (o // s, s) for e, s in enumerate(kernels)}
        shapes |= {f"{name}/{part}": shape for part, shape in parts.items()}
    return {name: 0.3 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def dense_update(get: Callable[[str], Tensor], layer: nn.Linear, config: dict[str, Any], task: int) -> Tensor:
    """(out, in): the release's update of one layer for one task."""
    p = (get("gate.weight") @ get("task_embedding")[task] + get("gate.bias")).softmax(dim=0)
    top, chosen = p.topk(config["top_k"])
    update = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    for weight, e in zip(top.softmax(dim=0), chosen.tolist(), strict=True):
        s = config["kernels"][e]
        h, w = layer.out_features // s, layer.in_features // s
        seed = get("B")[:h] @ get("A")[:, :w]
        expert = torch.einsum("cj,cb->cjb", get(f"kernel.{e}"), seed).reshape(h * s, w)
        update = update + weight * nn.functional.pad(expert, (0, layer.in_features - w, 0, layer.out_features - h * s))
    return config["alpha"] / config["rank"] * update


def write_case(folder: Path, kernels: tuple[int, ...], rank: int, top_k: int) -> None:
    """A case with these numbers on the stored case's model and inputs."""
    stored = WholeCase.read(STORED)
    config = {**stored.config, "kernels": list(kernels), "rank": rank, "top_k": top_k}
    description = {**stored.description, "config": config}
    model = build(stored).train()
    layers = {name: model.get_submodule(name) for name in stored.sites}
    drawn = {name: value.requires_grad_() for name, value in draw(layers, kernels, rank, config["num_tasks"]).items()}
    task = int(stored.tensors["input/task_id"])
    for name, layer in layers.items():
        update = dense_update(lambda part, name=name: drawn[f"{name}/{part}"], layer, config, task)
        layer.register_forward_hook(lambda module, args, y, update=update: y + args[0] @ update.T)
    inputs = stored.under("input/")
    inputs.pop("task_id")
    output = model(**inputs)
    grads = torch.autograd.grad(output.loss, list(drawn.values()), allow_unused=True)
    tensors = {name: value for name, value in stored.tensors.items() if name.startswith(("base/", "input/"))}
    tensors |= {f"adapter/{name}": value.detach() for name, value in drawn.items()}
    tensors |= {"expected/logits": output.logits.detach(), "expected/lm_loss": output.loss.detach().reshape(1)}
    tensors |= {f"expected/grad_lm/{name}": g for name, g in zip(drawn, grads, strict=True) if g is not None}
    (folder / "other.json").write_text(json.dumps(description))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "other.safetensors")


@pytest.mark.parametrize(("kernels", "rank", "top_k"), OTHERS)
def test_other_numbers_are_replayed(kernels: tuple[int, ...], rank: int, top_k: int, tmp_path: Path) -> None:
    write_case(tmp_path, kernels, rank, top_k)
    errors = replay.check_file(tmp_path / "other.json")
    assert errors.within
    assert errors.gradient < 1e-8
