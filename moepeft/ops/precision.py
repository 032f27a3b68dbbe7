"""Where products keep the precision of their operands."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast is off on the device of `x`. The meta device has no autocast, and torch refuses to name it."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
