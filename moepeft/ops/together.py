"""Small tensors of many sites as one tensor: an operation for all sites in place of one for each."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


class Together:
    """Stacks tensors of sites, and takes what was made of the stacks apart again.

    A site whose part nobody used has no gradient, as if the site had been computed by itself: an optimiser leaves the
    parameters of a layer that did not run alone.

    Args:
        sites: number of sites.
    """

    def __init__(self, sites: int) -> None:
        self._used = [False] * sites

    def stack(self, tensors: Sequence[Tensor], sites: Sequence[int] | None = None) -> Tensor:
        """A tensor (sites, *n) of one (*n) per site; `sites` numbers them where they are not all."""
        if len(self._used) == 1:
            return tensors[0].unsqueeze(0)
        stacked: Tensor = _Stacked.apply(self._used, self._numbers(sites), *tensors)  # type: ignore[no-untyped-call]
        return stacked

    def apart(self, stacked: Tensor, sites: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """The part of every site."""
        if len(self._used) == 1:
            return stacked.unbind()
        parts: tuple[Tensor, ...] = _Apart.apply(self._used, self._numbers(sites), stacked)  # type: ignore[no-untyped-call]
        return parts

    def _numbers(self, sites: Sequence[int] | None) -> Sequence[int]:
        return range(len(self._used)) if sites is None else sites


def alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """The numbers of equal keys, group by group."""
    groups: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return list(groups.values())


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, used: list[bool], sites: Sequence[int], *tensors: Tensor) -> Tensor:
        ctx.used, ctx.sites = used, sites
        return torch.stack(tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # A parameter keeps its part as its gradient only if the part lies in memory as the parameter does.
        parts = grad.contiguous().unbind()
        return None, None, *(part if ctx.used[site] else None for site, part in zip(ctx.sites, parts, strict=True))


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, used: list[bool], sites: Sequence[int], stacked: Tensor) -> tuple[Tensor, ...]:
        ctx.used, ctx.sites = used, sites
        ctx.set_materialize_grads(False)
        return stacked.unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, Tensor | None]:
        given = [grad for grad in grads if grad is not None]
        if not given:
            return None, None, None
        nothing = torch.zeros_like(given[0]) if len(given) < len(grads) else given[0]
        for site, grad in zip(ctx.sites, grads, strict=True):
            ctx.used[site] = ctx.used[site] or grad is not None
        return None, None, torch.stack([nothing if grad is None else grad for grad in grads])
