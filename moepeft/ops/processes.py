"""Processes and threads that share a model: sums over data-parallel processes, and what one thread does at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

F = TypeVar("F", bound=Callable[..., None])
_LOCK = threading.RLock()


def one_thread_at_a_time(function: F) -> F:
    """Let no two threads run the function, as one that draws values at the first forward and notes that it has."""

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> None:
        with _LOCK:
            function(*args, **kwargs)

    return cast(F, alone)


def has_processes() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized()


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, through which gradients flow; `value` itself where there is only one.

    Every process must call it the same number of times in the same order.
    """
    if not has_processes():
        return value
    total: Tensor = _Sum.apply(value)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    """Every process's loss depends on every process's value: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_processes(gradient)
