"""Configurations with a fault in one site, walked on a pretended device: its words are LABEL-ENDING FILE.

Writes for each configuration what the watch over the device says of each fault.
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moepeft
from tests.library.device.walk import TASKS, Walk
from tests.support.pretended_cuda import pretend
from tests.support.variants import variants


def read_a_value(output: Tensor) -> Tensor:
    """The host waits for the device."""
    return output * (2.0 if output.sum().item() > 0 else 1.0)


def make_a_tensor_on_the_host(output: Tensor) -> Tensor:
    """The sum mixes devices."""
    return output + torch.zeros(output.shape[-1])


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reads a value": read_a_value,
    "makes a tensor on the host": make_a_tensor_on_the_host,
}


def spoil(forward: Callable[..., Tensor], fault: Callable[[Tensor], Tensor], *args: Any) -> Tensor:
    """What the adapter computes, with a fault that no CPU shows."""
    return fault(forward(*args))


def find_faults(factory: moepeft.AdapterFactory) -> dict[str, dict[str, Any]]:
    """Fault -> the error of a steady step with this fault in the first site, if any, and the waits."""
    found: dict[str, dict[str, Any]] = {}
    with pretend() as device:
        walk = Walk("bert", factory)
        walk.attach()
        walk.step()
        adapter = walk.adapters.adapters[walk.adapters.sites[0].name]
        sound = adapter.forward
        for name, fault in FAULTS.items():
            adapter.forward = functools.partial(spoil, sound, fault)  # type: ignore[method-assign]
            device.waits.clear()
            error = None
            try:
                walk.step()
            except RuntimeError as raised:
                error = str(raised)
            found[name] = {"error": error, "waits": dict(device.waits)}
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    ending, target = sys.argv[1:]
    chosen = {label: each for label, each in variants(TASKS).items() if label.endswith(ending)}
    batch_first = {label: each for label, each in chosen.items() if each.capabilities.batch_first}
    Path(target).write_text(json.dumps({label: find_faults(each) for label, each in batch_first.items()}))
