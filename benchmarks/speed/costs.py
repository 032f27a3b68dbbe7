"""What a step costs apart from time: operations, memory kept for the backward pass, peak memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.instruments.clock import Step
from benchmarks.instruments.memory import memory_kind, peak_above
from benchmarks.speed.contestants import Contestant


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one step.

    Attributes:
        flops: floating-point operations of its matrix products, a multiply and an add each.
        kernels: tensor operations other than views, each one kernel or a few.
        saved_bytes: what autograd keeps for the backward pass, weights and each storage's second mention left out.
        peak_bytes: most memory at once, above that before the step.
        peak_kind: where `peak_bytes` was read.
    """

    flops: int
    kernels: int
    saved_bytes: int
    peak_bytes: int
    peak_kind: str


def measure_costs(contestant: Contestant, timed: Step, eager: Step, device: torch.device) -> Costs:
    """Run steps to count them.

    Args:
        contestant: whose steps they are.
        timed: the step as it is timed; where the device's allocator counts, its peak memory is measured.
        eager: the same to count, not compiled: compiled code shows neither its operations nor its tensors.
        device: where they run.
    """
    saved = _SavedTensors(contestant)
    with eager.around(), _frozen_in_inference(contestant):
        eager.prepare()
        with FlopCounterMode(display=False) as counter, _Kernels() as kernels:
            eager.run()
        eager.prepare()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            eager.run()
    peak_bytes = _peak(contestant, timed if device.type == "cuda" else eager, device)
    return Costs(counter.get_total_flops(), kernels.total, saved.total, peak_bytes, memory_kind(device))


@contextmanager
def _frozen_in_inference(contestant: Contestant) -> Iterator[None]:
    """The counter hooks into the gradients of whatever requires one, and fails where none is ever computed."""
    parameters = () if contestant.model.training else contestant.parameters
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class _Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts tensor operations; those that only look at memory otherwise run nothing."""

    VIEWS = (torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default)

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += not (operation.is_view or operation in self.VIEWS)
        return operation(*args, **(kwargs or {}))


class _SavedTensors:
    """Sums the distinct storages that autograd saves, the model's own weights left out."""

    def __init__(self, contestant: Contestant) -> None:
        owned = (*contestant.model.parameters(), *contestant.model.buffers())
        self._owned = {tensor.untyped_storage().data_ptr() for tensor in owned}
        # The tensors are held, so that no address is given out twice.
        self._seen: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Note the tensor; hand it on as it is."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self._owned:
            self._seen.setdefault(address, tensor.detach())
        return tensor

    @property
    def total(self) -> int:
        """Bytes of all."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._seen.values())


def _peak(contestant: Contestant, step: Step, device: torch.device) -> int:
    for parameter in contestant.parameters:
        parameter.grad = None
    with step.around():
        step.prepare()
        return peak_above(step.run, device)
