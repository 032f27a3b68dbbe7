"""Random starts of parameters."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(shape: tuple[int, ...], bound: float) -> Tensor:
    """Uniform draws in (-bound, bound)."""
    return torch.empty(shape).uniform_(-bound, bound)


def normal(shape: tuple[int, ...], std: float) -> Tensor:
    """Normal draws with mean 0."""
    return torch.randn(shape) * std
