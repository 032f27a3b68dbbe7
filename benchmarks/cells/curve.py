"""The training curve, read from the device without making the host wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.records.failures import Diverged
from benchmarks.records.schema import CurvePoint


@dataclass(frozen=True, slots=True)
class _Reading:
    """Values of one step on their way to the host.

    Attributes:
        step: counted from 1.
        rate: learning rate of the step.
        names: of the losses.
        values: shape (losses + 2,), on the host: the losses, the gradient norm, the first step that was not finite.
        arrived: passed by the device once `values` are there; None where they were on the host from the start.
    """

    step: int
    rate: float
    names: tuple[str, ...]
    values: Tensor
    arrived: torch.cuda.Event | None

    @property
    def is_there(self) -> bool:
        """Whether the values can be read without waiting."""
        return self.arrived is None or bool(self.arrived.query())  # type: ignore[no-untyped-call]


class CurveReader:
    """Notes points of the curve, and looks at each as soon as its values have come from the device.

    Args:
        curve: gets the points, in the order of the steps.
        device: where the losses are.
    """

    def __init__(self, curve: list[CurvePoint], device: torch.device) -> None:
        self.curve, self.device = curve, device
        self._first_bad = torch.zeros((), dtype=torch.double, device=device)
        self._readings: deque[_Reading] = deque()

    def watch(self, step: int, losses: Mapping[str, Tensor], norm: Tensor) -> Tensor:
        """Remember on the device whether this step is the first that is not finite; all values of the step."""
        values = torch.stack([value.float() for value in (*losses.values(), norm)]).double()
        finite = torch.isfinite(values).all()
        self._first_bad = torch.where(finite | (self._first_bad > 0), self._first_bad, step)
        return values

    def note(self, step: int, rate: float, names: tuple[str, ...], values: Tensor) -> None:
        """Send a point of the curve to the host, and look at those that are there.

        Raises:
            Diverged: a loss or the gradient norm became infinite or NaN.
        """
        sent = torch.cat([values, self._first_bad[None]]).to("cpu", non_blocking=True)
        arrived = None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._readings.append(_Reading(step, rate, names, sent, arrived))
        while self._readings and self._readings[0].is_there:
            self._read(self._readings.popleft())

    def catch_up(self) -> None:
        """Wait for the points that are still on their way, and for the steps after them; raises as `note` does."""
        while self._readings:
            reading = self._readings.popleft()
            if reading.arrived is not None:
                reading.arrived.synchronize()
            self._read(reading)
        _refuse_since(float(self._first_bad))

    def _read(self, reading: _Reading) -> None:
        *losses, norm, first_bad = map(float, reading.values.tolist())
        _refuse_since(first_bad)
        named = dict(zip(reading.names, losses, strict=True))
        self.curve.append(CurvePoint(step=reading.step, losses=named, learning_rate=reading.rate, gradient_norm=norm))


def _refuse_since(step: float) -> None:
    """Raise for the first step that was not finite; 0 if there was none."""
    if step:
        raise Diverged(f"a loss or the gradient norm is not finite since step {int(step)}; try a lower --learning-rate")
