"""Pretend that there is one CUDA device: tensors without values that know their device, on a torch without CUDA.

Two faults that a CPU never shows are found. An operation whose tensors stand on different devices raises. An operation
for which the host would wait for the device is noted, with the line that asked for it.

Works in a process that `tests.support.with_cuda_guard` started. Not seen: values, real kernels, and waits inside of
kernels.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten
# Operations whose result has a size that only the device knows, or that bring a value to the host.
WAITING = (
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
)
NO_KERNELS = (
    aten._unsafe_view.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    torch.ops.prim.device.default,
)


class Device(TorchDispatchMode):
    """Watches the pretended device, and makes up the values that are read.

    Attributes:
        device_value: what every value read from the device is.
        host_value: what every value read from the host is.
        waits: what the host waited for and the line that asked for it -> how often.
        kernels: operations on the device, views and mere allocations left out -> how often.
    """

    def __init__(self, device_value: float, host_value: float) -> None:
        super().__init__()
        self.device_value, self.host_value = device_value, host_value
        self.waits: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and operation.namespace == "aten":  # operations made of others come whole
            with self:
                made = operation.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.device.type == "cuda" for tensor in tensors)
        if operation is aten._local_scalar_dense.default:
            (tensor,) = tensors
            if on_device:
                self._note_wait("a value is read")
            value = self.device_value if on_device else self.host_value
            kind = bool if tensor.dtype == torch.bool else float if tensor.is_floating_point() else int
            return kind(value)
        if on_device and operation in WAITING:
            self._note_wait(str(operation))
        if operation is aten.index.Tensor and on_device:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self._note_wait("a mask is an index")
        made = operation(*args, **kwargs)
        self._note_copy(operation, args, kwargs)
        if (on_device or _on_device(made)) and not (operation.is_view or operation in NO_KERNELS):
            self.kernels[str(operation)] += 1
        return made

    def _note_copy(self, operation: Any, args: Any, kwargs: Any) -> None:
        """A copy between devices makes the host wait, unless it may go on and the host's memory is pinned.

        torch pins what such a copy to the host is written to.
        """
        if operation is aten._to_copy.default:
            source, target = args[0], kwargs.get("device") or args[0].device
            free = kwargs.get("non_blocking", False)
        elif operation is aten.copy_.default:
            source, target = args[1], args[0].device
            free = len(args) > 2 and args[2]
        else:
            return
        kinds = source.device.type, torch.device(target).type
        pinned = kinds[0] == "cuda" or getattr(source, "pretends_to_be_pinned", False)
        if kinds[0] != kinds[1] and not (free and pinned):
            self._note_wait(f"copy from {kinds[0]} to {kinds[1]}")

    def _note_wait(self, what: str) -> None:
        self.waits[f"{what}: {_asker()}"] += 1


def _on_device(made: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.device.type == "cuda" for leaf in tree_iter(made))


def _asker() -> str:
    """The innermost line of this project or of transformers."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if "site-packages" not in path.parts and path.is_relative_to(ROOT) and path != Path(__file__):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
        if "transformers" in path.parts:
            return f"transformers, {path.name}:{frame.lineno} {frame.name}"
    return "nobody known"


class _Values(FakeTensorMode):
    # Otherwise torch.cuda.is_available() decides whether a guard must stand in: here always.
    avoid_device_init = True


def _convert(mode: FakeTensorMode) -> Callable[..., nn.Module]:
    """`nn.Module._apply` that puts new parameters in place of the old: tensors without values cannot be swapped."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def without_values(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)

    def apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            apply(child, function)
        for key, parameter in self._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in moved:
                with torch.no_grad():
                    made = function(without_values(parameter))
                if made is not parameter:
                    made = nn.Parameter(made.detach(), parameter.requires_grad)
                # The old one is kept, so that no other gets its id.
                moved[id(parameter)] = parameter, made
            self._parameters[key] = moved[id(parameter)][1]
        for key, buffer in self._buffers.items():
            self._buffers[key] = None if buffer is None else function(without_values(buffer))
        return self

    return apply


class Event:
    """A mark in the device's queue, which is always empty."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _pin(tensor: Tensor, *_: object) -> Tensor:
    pinned = tensor.clone()
    pinned.pretends_to_be_pinned = True  # type: ignore[attr-defined]
    return pinned


@contextmanager
def pretend(device_value: float = 1, host_value: float = 1) -> Iterator[Device]:
    """Inside, torch says that it has CUDA, and makes tensors without values.

    A module made outside keeps its values on the CPU until ``module.to("cuda")``.

    Args:
        device_value: what every value read from the device is.
        host_value: what every value read from the host is.
    """
    with ExitStack() as stack:
        mode = _Values(allow_non_fake_inputs=True)
        answers: dict[str, Any] = {
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.device_count": lambda: 1,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.set_device": lambda device: None,
            "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
            "torch.cuda.Event": Event,
            "torch.cuda.get_device_name": lambda device=None: "pretended",
            "torch.cuda.synchronize": lambda device=None: None,
            "torch.cuda.empty_cache": lambda: None,
            "torch.cuda.reset_peak_memory_stats": lambda device=None: None,
            "torch.cuda.memory_allocated": lambda device=None: 0,
            "torch.cuda.max_memory_allocated": lambda device=None: 0,
            "torch.cuda.manual_seed_all": lambda seed: None,
            "torch.cuda.is_current_stream_capturing": lambda: False,
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.Tensor.pin_memory": _pin,
            "torch.Tensor.is_pinned": lambda tensor: getattr(tensor, "pretends_to_be_pinned", False),
            "torch.Tensor.tolist": _read_all,
            "torch.Tensor.__array__": lambda tensor, dtype=None: np.array(_read_all(tensor), dtype),
            "torch.nn.Module._apply": _convert(mode),
        }
        for target, answer in answers.items():
            stack.enter_context(mock.patch(target, answer))
        stack.enter_context(mode)
        yield stack.enter_context(Device(device_value, host_value))


def _read_all(tensor: Tensor) -> Any:
    return [_read_all(part) for part in tensor] if tensor.dim() else tensor.item()
