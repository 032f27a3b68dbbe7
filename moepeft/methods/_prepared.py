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
from moepeft.methods._pyramid import Definition, Pyramid, Ready
from moepeft.methods._task_gates import Selector, route_rows
from moepeft.ops.precision import without_autocast


class Prepared(NamedTuple):
    """Of a site; None of what the site makes itself.

    Attributes:
        gates: of the call's rows.
        table: a copy of the task table.
        ready: `Pyramid.ready`.
    """

    gates: Float[Tensor, "rows experts"] | None = None
    table: Float[Tensor, "tasks i"] | None = None
    ready: Ready | None = None

    def spread(self, rows: int, ctx: SiteContext) -> tuple[Float[Tensor, "rows experts"], Ready | None]:
        """Gates, and what is ready, for the `rows` rows of a site's input."""
        assert self.gates is not None
        what = f"{len(self.gates)} task ids"
        gates = ctx.spread(self.gates, rows, what)
        if self.ready is None or self.ready.kernel is None:
            return gates, self.ready
        runs = self.ready.runs if len(self.gates) in (1, rows) else WHOLE  # those of the call's rows
        return gates, self.ready._replace(kernel=ctx.spread(self.ready.kernel, rows, what), runs=runs)


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


def prepare_sites(sites: Sequence[Site], task_sets: Tensor | None, config: Config) -> Sequence[Prepared]:
    """What the sites find: gates if tasks route, and factors and kernels for the definition that has a fast path."""
    by_task = config.routing == "task"
    if by_task and (task_sets is None or task_sets.shape[1] != 1):
        return ()
    prepared = [Prepared() for _ in sites]
    if by_task and task_sets is not None:
        with without_autocast(task_sets):
            selectors = [Selector(site.task_embedding, site.gate.weight, site.gate.bias) for site in sites]
            routed = route_rows(selectors, sites[0].choose, task_sets[:, 0], selectors[0].table.dtype)
        prepared = [Prepared(gates, table) for gates, table in routed]
    make_ready = config.definition.make_ready
    if make_ready is None or torch.compiler.is_compiling() or not fast_paths_enabled():
        return prepared
    widths = [(site.in_features, site.out_features) for site in sites]
    gates = [each.gates for each in prepared if each.gates is not None]
    # Another class may choose gates of zero that have a gradient: all of its scales are computed.
    own_gates = type(sites[0]).choose.__module__.startswith("moepeft.")
    tasks = task_sets[:, 0] if by_task and own_gates and task_sets is not None else None
    ready = make_ready([site.pyramid() for site in sites], widths, gates or None, tasks)
    return [each._replace(ready=own) for each, own in zip(prepared, ready, strict=True)]
