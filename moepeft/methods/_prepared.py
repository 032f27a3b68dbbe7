"""What EPT's sites find made when a forward begins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moepeft.context import SiteContext
from moepeft.fast import fast_paths_enabled
from moepeft.methods._fast.ept_runs import WHOLE
from moepeft.methods._pyramid import Definition, Pyramid
from moepeft.methods._task_gates import Selector, route_rows
from moepeft.ops.precision import without_autocast


class Prepared(NamedTuple):
    """Of a site; None of what the site makes itself.

    Attributes:
        gates: of the call's rows.
        table: a copy of the task table.
        pyramid: with what is ready.
    """

    gates: Float[Tensor, "rows experts"] | None = None
    table: Float[Tensor, "tasks i"] | None = None
    pyramid: Pyramid | None = None

    def spread(self, rows: int, ctx: SiteContext) -> Prepared:
        """The same for the `rows` rows of a site's input."""
        if self.gates is None or ctx.holds(len(self.gates), rows):
            return self
        gates = ctx.spread(self.gates, rows)
        ready = None if self.pyramid is None else self.pyramid.ready
        if self.pyramid is None or ready is None or ready.kernel is None:
            return self._replace(gates=gates)
        runs = ready.runs if len(self.gates) == 1 else WHOLE  # those of the call's rows
        ready = ready._replace(kernel=ctx.spread(ready.kernel, rows), runs=runs)
        return self._replace(gates=gates, pyramid=self.pyramid._replace(ready=ready))


@runtime_checkable
class Config(Protocol):
    """What matters of the configuration."""

    @property
    def routing(self) -> Literal["task", "token"]: ...

    @property
    def definition(self) -> Definition: ...


class Site(nn.Module, ABC):
    """What matters of an adapter. No protocol: isinstance() would not find parameters on it from Python 3.12 on."""

    in_features: int
    out_features: int
    task_embedding: nn.Parameter
    gate: nn.Linear

    @abstractmethod
    def choose(self, logits: Float[Tensor, "*n experts"]) -> Float[Tensor, "*n experts"]:
        """Gates of the router's logits."""

    @abstractmethod
    def pyramid(self) -> Pyramid:
        """What the experts are made of."""


def prepare_sites(sites: Sequence[Site], tasks: Tensor | None, config: Config) -> Sequence[Prepared]:
    """What the sites find: gates if tasks route, and factors and kernels for the definition that has a fast path."""
    by_task = config.routing == "task"
    if by_task and tasks is None:
        return ()
    prepared = [Prepared() for _ in sites]
    if by_task and tasks is not None:
        with without_autocast(tasks):
            gates = [site.gate for site in sites]
            selectors = [
                Selector(site.task_embedding, gate.weight, gate.bias) for site, gate in zip(sites, gates, strict=True)
            ]
            routed = route_rows(selectors, sites[0].choose, tasks, selectors[0].table.dtype)
        prepared = [Prepared(gates, table) for gates, table in routed]
    make_ready = config.definition.make_ready
    if make_ready is None or torch.compiler.is_compiling() or not fast_paths_enabled():
        return prepared
    widths = [(site.in_features, site.out_features) for site in sites]
    of_rows = [each.gates for each in prepared if each.gates is not None]
    # Another class may choose gates of zero that have a gradient: all of its scales are computed.
    own_gates = type(sites[0]).choose.__module__.startswith("moepeft.")
    pyramids = [site.pyramid() for site in sites]
    ready = make_ready(pyramids, widths, of_rows or None, tasks if by_task and own_gates else None)
    return [
        Prepared(each.gates, each.table, pyramid._replace(ready=own))
        for each, pyramid, own in zip(prepared, pyramids, ready, strict=True)
    ]
