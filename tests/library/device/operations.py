"""Count the operations of a training step at T5-base's shapes on a pretended device: its words are METHODS FILE.

A step is forward, auxiliary loss and backward, in bf16 under autocast, of one layer of each stack. Views and mere
allocations are no operations.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import moepeft
from benchmarks.speed.hosts import vocabulary_embeddings
from tests.support.pretended_cuda import Device, pretend

ROWS, LENGTH, TASKS = 32, 128, 8
FROZEN = "frozen"


def t5_base() -> nn.Module:
    config = T5Config(
        d_model=768, d_ff=3072, num_layers=1, num_heads=12, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False
    )
    with torch.device("cuda"):
        return T5ForConditionalGeneration(config).to(torch.bfloat16).train()


def require_gradient(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output.requires_grad_()


def count(method: str, device: Device) -> tuple[int, int]:
    """Operations of the second step, and the number of adapted layers; `FROZEN` is the bare model."""
    model = t5_base()
    adapters = None if method == FROZEN else moepeft.attach(model, moepeft.method(method, num_tasks=TASKS))
    if adapters is None:
        model.requires_grad_(False)
        for embedding in vocabulary_embeddings(model):
            embedding.register_forward_hook(require_gradient)
    with torch.device("cuda"):
        ids = torch.randint(3, 1000, (ROWS, LENGTH))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if adapters is not None:
        inputs["task_ids"] = torch.arange(ROWS, device="cuda") % TASKS
    for _ in range(2):  # a method may look at its first batch
        model.zero_grad(set_to_none=True)
        device.kernels.clear()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**inputs).loss
        (loss if adapters is None else loss + adapters.aux_loss()).backward()
    return sum(device.kernels.values()), 0 if adapters is None else len(adapters.sites)


def operations_per_site(methods: list[str]) -> dict[str, float]:
    """Operations above the frozen model's for each adapted layer."""
    counted = {}
    for method in (FROZEN, *methods):
        with pretend() as device:
            counted[method] = count(method, device)
    frozen, _ = counted.pop(FROZEN)
    return {method: (operations - frozen) / sites for method, (operations, sites) in counted.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    methods, target = sys.argv[1:]
    Path(target).write_text(json.dumps(operations_per_site(methods.split(",")), indent=1))
