"""Small tensors of many sites as one tensor: an operation for all sites in place of one for each."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Together:
    """Stacks tensors of sites, and takes what was made of the stacks apart again.

    A site whose part nobody used has no gradient, as if the site had been computed by itself: an optimiser leaves the
    parameters of a layer that did not run alone. All stacks are one operation of autograd, and so are all parts: its
    price is one by operation, however many tensors go through.

    Args:
        sites: number of sites.
    """

    def __init__(self, sites: int) -> None:
        self._used = [False] * sites

    def stack(self, *stacks: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """Of every stack a tensor (sites, *n) of one (*n) per site, by the site's number."""
        if len(self._used) == 1:
            return tuple(tensor.unsqueeze(0) for own in stacks for tensor in own.values())
        tensors = [tensor for own in stacks for tensor in own.values()]
        stacked: tuple[Tensor, ...] = _Stacked.apply(self._used, [tuple(own) for own in stacks], *tensors)  # type: ignore[no-untyped-call]
        return stacked

    def apart(self, *stacks: tuple[Sequence[int], Tensor]) -> list[dict[int, Tensor]]:
        """Of every stack, given with the sites that it holds, the part of each site."""
        numbers, stacked = zip(*stacks, strict=True)
        if len(self._used) == 1:
            return [dict(zip(own, tensor.unbind(), strict=True)) for own, tensor in stacks]
        parts = iter(_Apart.apply(self._used, numbers, *stacked))  # type: ignore[no-untyped-call]
        return [{number: next(parts) for number in own} for own in numbers]


def alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """The numbers of equal keys, group by group."""
    groups: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return list(groups.values())


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, used: list[bool], stacks: Sequence[Sequence[int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.used, ctx.stacks = used, stacks
        ctx.set_materialize_grads(False)
        left = iter(tensors)
        return tuple([torch.stack([next(left) for _ in own]) for own in stacks])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        parts: list[Tensor | None] = []
        for own, grad in zip(ctx.stacks, grads, strict=True):
            # A parameter keeps its part as its gradient only if the part lies in memory as the parameter does.
            of_sites = [None] * len(own) if grad is None else grad.contiguous().unbind()
            parts += [part if ctx.used[site] else None for site, part in zip(own, of_sites, strict=True)]
        return None, None, *parts


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, used: list[bool], stacks: Sequence[Sequence[int]], *stacked: Tensor) -> tuple[Tensor, ...]:
        ctx.used, ctx.stacks = used, stacks
        ctx.set_materialize_grads(False)
        return tuple([part for tensor in stacked for part in tensor.unbind()])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        left, of_stacks = iter(grads), []
        for own in ctx.stacks:
            parts = [next(left) for _ in own]
            for site, part in zip(own, parts, strict=True):
                ctx.used[site] = ctx.used[site] or part is not None
            given = next((part for part in parts if part is not None), None)
            nothing = None if given is None or all(part is not None for part in parts) else torch.zeros_like(given)
            whole = None if given is None else torch.stack([nothing if part is None else part for part in parts])  # type: ignore[misc]
            of_stacks.append(whole)
        return None, None, *of_stacks
