"""torch.compile for models that several methods share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VARIANTS = 256
"""Contestants and cells share the backbone's code; torch.compile keeps one variant of it per method and shape."""


def compiled_call(model: nn.Module, mode: str = "default") -> Callable[..., Any]:
    """The model's call, compiled when it is first made.

    Args:
        model: with its adapters.
        mode: of torch.compile.
    """
    from torch import _dynamo  # takes a second to import

    _dynamo.config.recompile_limit = VARIANTS
    _dynamo.config.accumulated_recompile_limit = VARIANTS
    function: Callable[..., Any] = torch.compile(model, mode=mode)
    return function
