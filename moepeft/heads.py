"""Heads per task: copies of one module, of which each row of a batch goes through its own task's.

The module keeps its place, name and values. Its copies train beside the adapters and are routed by the same ids.
Merged for a task, the module has the values of that task's copy.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import task_number
from .context import SiteContext
from .entries import backward_under_way, begin_at_layer
from .errors import Unsupported
from .protocols import AdapterFactory
from .sites import LinearSite
from .state import State

HEADS = "moepeft_heads"


class Heads(nn.ModuleList):
    """The copies of one module, a child of that module."""

    def __init__(self, module: nn.Module, name: str, number: int, state: State) -> None:
        super().__init__(copy.deepcopy(module).requires_grad_(True) for _ in range(number))
        self.state = state
        self.context = SiteContext(state.runtime, LinearSite(name, 0, 0))


def check(model: nn.Module, modules: Iterable[str], factory: AdapterFactory) -> None:
    """Whether the method knows which tasks there are, and no other library answers the modules' calls.

    Raises:
        Unsupported: it does not.
    """
    if factory.capabilities.routing != "task" or task_number(factory) is None:
        raise Unsupported(
            f"train_per_task needs a method that routes by task, and {factory.name} does not: take one that does, such "
            "as lora-per-task, or name the modules in train"
        )
    for name in modules:
        if "forward" in vars(model.get_submodule(name)):
            raise Unsupported(f"the forward of {name!r} was replaced by another library: its head cannot be per task")


def install(state: State) -> None:
    """Give every module that `train_per_task` names its copies."""
    number = task_number(state.factory)
    for name in state.train_per_task:
        module = state.model.get_submodule(name)
        setattr(module, HEADS, Heads(module, name, number or 0, state))
    bind(state)


def remove(state: State) -> None:
    """Undo `install`."""
    unbind(state)
    for name in state.train_per_task:
        delattr(state.model.get_submodule(name), HEADS)


@torch.no_grad()
def restart(state: State) -> None:
    """Let all copies begin as their module, as `install` made them; merged, the module has one task's values."""
    for name in () if state.merged else state.train_per_task:
        module = state.model.get_submodule(name)
        own = _values(module)
        for copied in heads_of(module):
            for key, value in _values(copied).items():
                value.copy_(own[key])


def grow(state: State, number: int) -> None:
    """Copies for more tasks; they begin as the module."""
    unbind(state)
    for name in state.train_per_task:
        module = state.model.get_submodule(name)
        heads = heads_of(module)
        delattr(module, HEADS)
        heads.extend(copy.deepcopy(module).requires_grad_(True) for _ in range(number))
        setattr(module, HEADS, heads)
    bind(state)


def bind(state: State) -> None:
    """Let the copies answer the calls of their modules."""
    for name in state.train_per_task:
        module = state.model.get_submodule(name)
        module.forward = functools.partial(_routed, module)


def unbind(state: State) -> None:
    """Let the modules answer themselves."""
    for name in state.train_per_task:
        vars(state.model.get_submodule(name)).pop("forward", None)


def heads_of(module: nn.Module) -> Heads:
    """The copies of a module."""
    heads = module._modules[HEADS]
    assert isinstance(heads, Heads)
    return heads


def own_values(state: State) -> dict[str, Tensor]:
    """The values of the modules themselves, by name in the model."""
    return {
        f"{name}.{key}": value
        for name in state.train_per_task
        for key, value in _values(state.model.get_submodule(name)).items()
    }


def values_of(state: State, task: int | None) -> dict[str, Tensor]:
    """The values of a task's copies, under the names of the modules'."""
    return {
        f"{name}.{key}": value
        for name in state.train_per_task
        for key, value in _values(heads_of(state.model.get_submodule(name))[task or 0]).items()
    }


def expected(model: nn.Module, modules: Iterable[str], factory: AdapterFactory) -> dict[str, Tensor]:
    """What the copies' values will be like, by name, for a bare model."""
    return {
        f"{name}.{HEADS}.{task}.{key}": value
        for name in modules
        for task in range(task_number(factory) or 0)
        for key, value in _values(model.get_submodule(name)).items()
    }


def _values(module: nn.Module) -> Mapping[str, Tensor]:
    kept: Mapping[str, Tensor] = module.state_dict(keep_vars=True)
    return {key: value for key, value in kept.items() if HEADS not in key.split(".")}


def _routed(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """What a module with heads per task computes: each row by its own task's copy."""
    heads = heads_of(module)
    runtime = heads.state.runtime
    x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    if runtime.forward is None:
        backward = backward_under_way()
        if backward is not None:
            with runtime.resumed_at(x, backward):
                return _routed(module, *args, **kwargs)
        runtime.begin(begin_at_layer(heads.state, x, module.training))
        try:
            return _routed(module, *args, **kwargs)
        finally:
            runtime.end()
    forward = runtime.forward
    if not forward.settings.enabled:
        return type(module).forward(module, *args, **kwargs)
    forward.input = forward.given = None  # of the adapted layer before
    tasks = heads.context.tasks(x.shape[0]).to(x.device)
    # Every copy sees all rows: heads are small, and no value of the ids has to be looked at.
    outputs = [head(*args, **kwargs) for head in heads]
    if not all(isinstance(output, Tensor) and output.shape[0] == x.shape[0] for output in outputs):
        raise Unsupported(f"{heads.context.site.name!r} returns no tensor with the rows first: it cannot be per task")
    return torch.stack(outputs)[tasks, torch.arange(x.shape[0], device=x.device)]
