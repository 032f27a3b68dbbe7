"""Where products keep the precision of their operands."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast is off on the device of `x`. The meta device has no autocast, and torch refuses to name it."""
    # To switch off what is off takes as long as three small products.
    off = x.is_meta or not torch.is_autocast_enabled(x.device.type)
    return nullcontext() if off else torch.autocast(x.device.type, enabled=False)
