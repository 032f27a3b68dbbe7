"""Averaged weights: what is scored of a run at a constant rate.

With weights w_t after step t, a decay d and a_0 = w_0:

    a_t = d_t a_(t-1) + (1 - d_t) w_t,   d_t = min(d, (1 + t) / (10 + t))

(Polyak and Juditsky 1992, SIAM Journal on Control and Optimization 30, 838-855). A falling rate averages noise out as
well, yet only at its end. Averages make every step a valid end: one run gives the whole curve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """The average of what trains.

    Args:
        parameters: whatever the optimiser changes.
        decay: d, in [0, 1).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = list(parameters), decay
        self._averages = [parameter.detach().clone() for parameter in parameters]
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of one more step in."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        torch._foreach_lerp_(self._averages, [one.detach() for one in self._parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averages as its weights; afterwards, to the bit, those it had before."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
