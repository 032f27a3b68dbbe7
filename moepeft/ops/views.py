"""What is seen of a tensor beside arithmetic: its values without its graph, and whether two are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def without_graph(value: Any) -> Any:
    """The value with every tensor, also in tuples, cut from its graph."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_() if value.requires_grad else value
    if isinstance(value, tuple):
        parts = [without_graph(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def version_of(x: Tensor) -> int | None:
    """How often a tensor was changed in place; None where nobody counts. Compiled code counts as never changed."""
    if torch.compiler.is_compiling():
        return 0
    return None if x.is_inference() else x._version


def same_values(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are None, or tensors of the same values."""
    if one is None or other is None or one is other:
        return one is other
    if one.shape != other.shape or one.device != other.device:
        return False
    # Views of one tensor are the same without a look at values, for which the host would wait for a GPU.
    views = one.untyped_storage() is other.untyped_storage() and one.storage_offset() == other.storage_offset()
    return (views and one.stride() == other.stride()) or torch.equal(one, other)
