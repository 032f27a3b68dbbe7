"""Random configurations of any registered method, and networks that every method can adapt.

Configurations come from the fields of the method's class: what a field may be follows from its type. A further method
needs no strategy of its own.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

import moepeft
from moepeft.config import ablations
from moepeft.errors import ConfigError, MissingRouting, Unsupported
from moepeft.registry import factory_class

TASKS = 4
counts = st.integers(1, 6)


class FeedForward(nn.Module):
    """A network that every method can adapt, plain or gated."""

    def __init__(self, width: int, inner: int, *, gated: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner) if gated else None
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.up_proj(x)) if self.gate_proj is None else F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner)


class Stack(nn.Module):
    """Such networks one after the other. As in a transformer each reads normalised features: numbers stay near 1."""

    def __init__(self, depth: int, width: int, inner: int, *, gated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FeedForward(width, inner, gated=gated) for _ in range(depth))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(F.normalize(x, dim=-1))
        return x


@st.composite
def configurations(draw: st.DrawFn, name: str) -> moepeft.AdapterFactory:
    """A preset or ablation of the method with random values in the fields that change what is computed."""
    cls = factory_class(name)
    presets = {**ablations(cls), **cls.presets}
    values = dict(presets[draw(st.sampled_from(sorted(presets)))])
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        strategy = _values_of(hints[field.name], field.default)
        if field.name == "num_tasks":
            values["num_tasks"] = TASKS
        elif field.name == "dropout":
            values["dropout"] = 0.0
        elif strategy is not None:
            values[field.name] = draw(strategy)
    try:
        return moepeft.method(name, **values)
    except ConfigError:
        assume(False)
        raise


def _values_of(hint: Any, default: Any) -> st.SearchStrategy[Any] | None:
    """Values of a field by its type; None leaves the preset's."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        strategies = [st.none() if kind is types.NoneType else _values_of(kind, default) for kind in arguments]
        return st.one_of(*(strategy for strategy in strategies if strategy is not None))
    if origin is Literal:
        return st.sampled_from(arguments)
    if hint is bool:
        return st.booleans()
    if hint is int:
        return counts
    if hint is float and default is None:
        return st.sampled_from([0.1, 0.9])
    if hint is float and default > 0:  # a coefficient may be zero; what may not is refused, and another drawn
        return st.sampled_from([default, default / 2, 0.0]) if default < 1 else st.just(default)
    if hint == tuple[int, ...] and default:  # one that is empty names tasks or layers, which a draw does not know
        return st.lists(counts, min_size=1, max_size=6).map(tuple)
    if origin is tuple and isinstance(default, tuple) and default:
        return st.sets(st.sampled_from(default), min_size=1).map(lambda chosen: tuple(sorted(chosen)))
    return None


@st.composite
def cases(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A configuration, and the shape of a network and a batch."""
    shape = {
        "depth": st.integers(1, 2),
        "width": st.integers(5, 13),
        "inner": st.integers(5, 17),
        "gated": st.booleans(),
        "rows": st.integers(1, 5),
        "length": st.integers(1, 6) | st.integers(15, 17),  # EPT multiplies rows of 16 tokens and more one by one
        "masked": st.booleans(),
        "grid": st.booleans(),  # positions have two axes, and in memory the second comes first
        "several_tasks": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
    return {"config": draw(configurations(name)), **{key: draw(strategy) for key, strategy in shape.items()}}


def network(case: dict[str, Any]) -> nn.Module:
    """The bare network of a case."""
    torch.manual_seed(case["seed"])
    return Stack(case["depth"], case["width"], case["inner"], gated=case["gated"])


def attach_or_draw_again(model: nn.Module, factory: moepeft.AdapterFactory) -> moepeft.Attachment:
    """Attach; a method that says that the network does not suit it is given another."""
    try:
        return moepeft.attach(model, factory)
    except Unsupported:
        assume(False)
        raise


def inputs_of(case: dict[str, Any]) -> dict[str, Tensor]:
    """Features, task ids and padding mask of a case."""
    rows, length = case["rows"], case["length"]
    if case["grid"] and case["config"].capabilities.batch_first:
        x, positions = torch.randn(rows, length, 2, case["width"]).transpose(1, 2), 2 * length
    else:
        x, positions = torch.randn(rows, length, case["width"]), length
    tasks = rows if case["config"].capabilities.batch_first else length
    inputs = {"x": x, "task_ids": torch.randint(0, TASKS, (tasks,))}
    if case["masked"] and case["config"].capabilities.batch_first:
        real = torch.randint(1, positions + 1, (rows, 1))
        inputs["attention_mask"] = (torch.arange(positions) < real).long()
    return inputs


def with_several_tasks(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows with two tasks each, or one and padding, if the method knows such rows."""
    ids = torch.randint(0, TASKS, (len(inputs["task_ids"]), 2))
    ids[::2, 1] = -1
    changed = {**inputs, "task_ids": ids}
    try:
        with torch.no_grad():
            model(**changed)
    except MissingRouting:
        return inputs
    return changed
