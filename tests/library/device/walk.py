"""Walk one host's configurations through a method's life on pretended cuda:0.

``python -m tests.support.with_cuda_guard tests.library.device.walk HOST FILE LABEL...`` writes, for each configuration
and phase, what failed and what the host waited for.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

import moepeft
from tests.support.hosts import VOCABULARY, build
from tests.support.pretended_cuda import Device, pretend
from tests.support.variants import variants

ROWS, LENGTH, TASKS = 4, 7, 3


def one_layer(name: str) -> nn.Module:
    """A host on the device, cut to one layer of each stack."""
    with torch.device("cuda"):
        model = build(name)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == 2 and type(module[0]) is type(module[1]):
            del module[1]
    config: Any = model.config
    config.num_hidden_layers = 1
    if name == "t5":
        config.num_decoder_layers = 1
    return model


def make_inputs(name: str) -> dict[str, Tensor]:
    with torch.device("cuda"):
        ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if name == "t5":
            inputs["labels"] = torch.randint(3, VOCABULARY, (ROWS, 5))
        if name == "llama":
            inputs["labels"] = ids
    return inputs


class Walk:
    """One configuration on one host; `phases` lists what it goes through.

    Args:
        host: name of the host.
        factory: the configuration.
    """

    def __init__(self, host: str, factory: moepeft.AdapterFactory) -> None:
        self.host, self.factory = host, factory
        self.model, self.inputs = one_layer(host), make_inputs(host)
        self.ids = torch.arange(ROWS, device="cuda") % TASKS

    def attach(self) -> None:
        self.adapters = moepeft.attach(self.model, self.factory)
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        stray = [name for name, tensor in tensors if tensor.device.type != "cuda"]
        assert not stray, f"not on the device: {stray}"
        self.trained = list(self.adapters.parameters())
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-3)
        self.model.train()

    def step(self) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = self.model(**self.inputs, task_ids=self.ids)
            loss = output.loss if "labels" in self.inputs else output.last_hidden_state.float().square().mean()
        (loss + self.adapters.aux_loss()).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        self.adapters.after_step()
        self.optimiser.zero_grad(set_to_none=True)

    def checkpointed_step(self) -> None:
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.config.use_cache = False
        self.step()
        self.model.gradient_checkpointing_disable()

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16), self.adapters.recording() as records:
            self.model(**self.inputs, task_ids=self.ids)
        assert all(value.device.type == "cuda" for values in records.values() for value in values.values())

    def merge(self) -> None:
        by_task = self.factory.capabilities.routing == "task"
        self.adapters.merge(task=0 if by_task else None)
        with torch.no_grad():
            self.model(**self.inputs, **({"task_ids": torch.zeros_like(self.ids)} if by_task else {}))
        self.adapters.unmerge()

    def generate(self) -> None:
        prompt = {name: self.inputs[name] for name in ("input_ids", "attention_mask")}
        with self.adapters.route(task_ids=self.ids):
            self.model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)

    def prefill(self) -> None:
        """A prompt into a cache that counts its positions on the device."""
        self.cache = StaticCache(config=self.model.config, max_cache_len=16)
        self.decode(self.inputs["input_ids"])

    def decode(self, given: Tensor | None = None) -> None:
        given = self.inputs["input_ids"][:, :1] if given is None else given
        places = torch.arange(given.shape[1], device="cuda").expand(given.shape)
        with torch.no_grad():
            self.model(given, position_ids=places, past_key_values=self.cache, use_cache=True, task_ids=self.ids)

    def move(self) -> None:
        """A training forward on the host, and the step after the model has come back to the device."""
        self.model.to("cpu").train()
        inputs = {name: value.cpu() for name, value in self.inputs.items()}
        with moepeft.fast_paths(False):  # some would ask on the host for values, which nothing has here
            self.model(**inputs, task_ids=self.ids.cpu())
        self.model.to("cuda")
        self.adapters.after_step()
        self.step()

    def detach(self) -> None:
        self.adapters.detach()

    @property
    def phases(self) -> dict[str, Callable[[], None]]:
        phases = {
            "attach": self.attach,
            "first step": self.step,
            "steady step": self.step,
            "steady checkpointed step": self.checkpointed_step,
            "steady evaluation": self.evaluate,
        }
        if self.factory.capabilities.not_mergeable is None:
            phases["merge"] = self.merge
        if "labels" in self.inputs:
            phases["generate"] = self.generate
        if self.host == "llama":
            phases |= {"prefill": self.prefill, "steady decoding": self.decode}
        return {**phases, "move": self.move, "detach": self.detach}


def follow(walk: Walk, device: Device) -> dict[str, dict[str, Any]]:
    """Phase -> its error, if any, and the waits."""
    found: dict[str, dict[str, Any]] = {}
    for name, work in walk.phases.items():
        device.waits.clear()
        error = None
        try:
            work()
        except Exception as raised:
            frame = traceback.extract_tb(raised.__traceback__)[-1]
            error = f"{type(raised).__name__}: {raised} ({frame.filename}:{frame.lineno})"
        found[name] = {"error": error, "waits": dict(device.waits)}
    return found


def main(host: str, target: Path, labels: list[str]) -> None:
    found, known = {}, variants(TASKS)
    for label in labels:
        with pretend() as device:
            found[label] = follow(Walk(host, known[label]), device)
    target.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
