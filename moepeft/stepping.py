"""What happens beside the optimiser's step: adapters that balance without a loss are handed what they counted."""

from __future__ import annotations

import torch

from .errors import MissingStep
from .ops.processes import sum_over_processes
from .protocols import Stepping
from .state import State


@torch.no_grad()
def after_step(state: State) -> None:
    """Hand every `Stepping` adapter its tallies since the last optimiser step.

    With several processes the tallies are summed over all of them in one exchange, so that the adapters stay equal.
    """
    tallies = state.runtime.take_tallies()
    adapters = [(name, adapter) for name, adapter in state.adapters.items() if isinstance(adapter, Stepping)]
    counted = [(adapter, tallies[name]) for name, adapter in adapters if name in tallies]
    if not counted:
        return
    sizes = [counts.numel() for _, counts in counted]
    # Layers may stand on several devices, and on others than when they counted.
    devices = [next(adapter.parameters()).device for adapter, _ in counted]
    joint = torch.cat([counts.flatten().to(devices[0]) for _, counts in counted])
    sums = torch.split(sum_over_processes(joint), sizes)
    for (adapter, counts), device, summed in zip(counted, devices, sums, strict=True):
        adapter.after_step(summed.view_as(counts).to(device))


def check_stepped(state: State) -> None:
    """Refuse a training forward if the optimiser stepped since the last one and nobody said so.

    Raises:
        MissingStep: tallies wait for `after_step`, but the parameters have changed since they were counted.
    """
    if torch.compiler.is_compiling():  # a graph holds no version of a parameter; eager forwards still look
        return
    version = next(parameter._version for _, parameter in state.named_parameters() if parameter.requires_grad)
    if state.runtime.tallies and version != state.stepping_version:
        raise MissingStep(
            f"{state.factory.name} balances its experts after every optimiser step, but the parameters changed without "
            "a call to after_step(): call after_step() on the attachment after optimiser.step()"
        )
    state.stepping_version = version
