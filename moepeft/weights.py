"""Weights as merging reads and writes them: plain ones, and those that bitsandbytes stores in 4 or 8 bit.

A plain weight changes in place. A quantised one is read as numbers, and what is written is quantised again, as the
`peft` package does it: the layer gets a new parameter, and the old one is what is kept.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from .errors import NotMergeable


class Weight:
    """A tensor of floating-point numbers, which changes in place: whoever holds the tensor sees the change."""

    rounds = False
    """Whether what is written is quantised."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def read(self) -> Tensor:
        """The numbers, in the layer's own layout."""
        return self._tensor

    def write(self, values: Tensor) -> None:
        """Store other numbers, as near as the weight's type can."""
        self._tensor.copy_(values)

    def keep(self) -> Any:
        """What `restore` needs to bring the weight back bit for bit."""
        return self._tensor.detach().clone()

    def restore(self, kept: Any) -> None:
        """Bring back what `keep` gave."""
        self._tensor.copy_(kept)


def has_numbers(parameter: Tensor) -> bool:
    """Whether a parameter holds its own numbers; bitsandbytes may store codes of 4 bit in a floating-point type."""
    return parameter.is_floating_point() and not hasattr(parameter, "quant_state")


_BESIDE = ("quant_state", "state")


class _Quantised(Weight):
    """What both kinds of quantised weights share: the layer's parameter is replaced, and the old one is kept."""

    rounds = True

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def keep(self) -> Any:
        """The parameter, and the state that bitsandbytes keeps beside it."""
        state = {name: self._layer.__dict__[name] for name in _BESIDE if name in self._layer.__dict__}
        return self._layer.weight, state

    def restore(self, kept: Any) -> None:
        """The parameter takes its place again.

        Raises:
            NotMergeable: the model was moved since: a quantised weight does not follow.
        """
        weight, state = kept
        if weight.device != self._layer.weight.device:
            raise NotMergeable(
                f"the model was merged on {weight.device} and is on {self._layer.weight.device} now: move it back, "
                "unmerge() there, and move it then"
            )
        self._layer.weight = weight
        self._layer.__dict__.update(state)


class FourBit(_Quantised):
    """The weight of a bitsandbytes `Linear4bit`."""

    def read(self) -> Tensor:
        """The numbers, in the type that they were quantised from."""
        from bitsandbytes.functional import dequantize_4bit

        weight = self._layer.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            # A forward in evaluation mode packs the weight on some CPUs. Saving unpacks: here a copy, not the weight.
            shell = type(self._layer)(weight.shape[0], 1, bias=False)
            shell.weight = copy.deepcopy(weight)
            shell.state_dict()
            weight = shell.weight
        numbers: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return numbers

    def write(self, values: Tensor) -> None:
        """Quantised with the block size and type of before."""
        old = self._layer.weight
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        how = {name: getattr(old, name) for name in names}
        made = type(old)(values.to("cpu"), requires_grad=False, module=self._layer, **how)
        self._layer.weight = made.to(old.device)


class EightBit(_Quantised):
    """The weight of a bitsandbytes `Linear8bitLt`."""

    def read(self) -> Tensor:
        """The numbers in float32."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        weight, state = self._layer.weight, self._layer.state
        numbers: Tensor = int8_vectorwise_dequant(weight.data, weight.SCB if state.SCB is None else state.SCB)
        return numbers

    def write(self, values: Tensor) -> None:
        """Quantised row by row. The next forward makes the state anew."""
        old = self._layer.weight
        made = type(old)(values.to("cpu"), requires_grad=False, has_fp16_weights=False)
        self._layer.weight = made.to(old.device)
        self._layer.state = copy.copy(self._layer.state)
        self._layer.state.CB = self._layer.state.SCB = None


def stored_weight(layer: nn.Module) -> Weight | None:
    """How the weight of a layer is read and written; None if it is no matrix of numbers that is known here."""
    weight: Any = layer.weight
    kind, quantised = type(weight).__name__, not weight.is_floating_point()
    if kind == "Params4bit" and weight.quant_state is not None:  # which may be stored as floating-point numbers
        return FourBit(layer)
    if kind == "Int8Params" and quantised:
        return EightBit(layer)
    return None if quantised else Weight(weight)
