"""How much memory a step takes: from CUDA's allocator, elsewhere by following its tensors.

The resident set of the process would be at hand as well, but shows what an allocator keeps, cuts up and gives back as
much as what a method needs: two runs of one step differ by a fifth.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CUDA_ALLOCATOR = "CUDA allocator"
LIVE_TENSORS = "tensors alive at once"


def memory_kind(device: torch.device) -> str:
    """Where `peak_above` and `held` read."""
    return CUDA_ALLOCATOR if device.type == "cuda" else LIVE_TENSORS


def peak_above(step: Callable[[], object], device: torch.device) -> int:
    """Run the step; most bytes it had at once, above what was there before.

    Args:
        step: not compiled, unless the device is CUDA's: compiled code does not show its tensors.
        device: where it runs.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    live = LiveTensors()
    with live:
        step()
    return live.peak


def held(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes taken between steps: all that CUDA's allocator gave out; elsewhere what these tensors stand in."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (each.untyped_storage() for each in tensors)}
    return sum(storages.values())


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made inside, until nothing refers to them; a kernel's own scratch is not seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What comes in from outside, and views of it, were there before.
        self._known.update(_storages((args, kwargs)))
        made = operation(*args, **(kwargs or {}))
        for storage in _storages(made):
            if storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _freed(self, size: int) -> None:
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]
