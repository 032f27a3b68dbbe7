"""Fast and naive paths agree in outputs, losses and gradients over random shapes and configurations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moepeft
from tests.support.naive import NAIVE

TOLERANCE = 1e-10
TASKS = 4


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


def draw_all(draw: st.DrawFn, fields: dict[str, st.SearchStrategy[Any]]) -> dict[str, Any]:
    return {name: draw(strategy) for name, strategy in fields.items()}


counts = st.integers(1, 5)
task_losses = {
    "contrastive": st.sampled_from([0.0, 0.1]),
    "anchor": st.sampled_from(["mean", "first"]),
    "num_tasks": st.just(TASKS),
}


@st.composite
def ept_fields(draw: st.DrawFn) -> dict[str, Any]:
    kernels = draw(st.lists(counts, min_size=1, max_size=6))
    fixed = {
        "rank": counts,
        "top_k": st.integers(1, len(kernels)),
        "routing": st.sampled_from(["task", "token"]),
        "gates": st.sampled_from(["softmax", "double_softmax"]),
        "gate_bias": st.booleans(),
        "operator": st.sampled_from(["kronecker", "channel"]),
        "dimension_scale": st.booleans(),
        **task_losses,
    }
    return {"kernels": tuple(kernels), **draw_all(draw, fixed)}


@st.composite
def mixlora_fields(draw: st.DrawFn) -> dict[str, Any]:
    experts = draw(counts)
    targets = draw(st.sets(st.sampled_from(["gate", "up", "down"]), min_size=1))
    fixed = {
        "rank": counts,
        "top_k": st.integers(1, experts),
        "balance": st.sampled_from(["layer", "pooled"]),
        "balance_coefficient": st.sampled_from([0.0, 0.1]),
    }
    return {"num_experts": experts, "targets": tuple(sorted(targets)), **draw_all(draw, fixed)}


@st.composite
def moelora_fields(draw: st.DrawFn) -> dict[str, Any]:
    experts = draw(counts)
    fixed = {"task_dim": counts, "gate": st.sampled_from(["shared", "per_site"]), "num_tasks": st.just(TASKS)}
    return {"num_experts": experts, "rank": experts * draw(st.integers(1, 3)), **draw_all(draw, fixed)}


@st.composite
def more_fields(draw: st.DrawFn) -> dict[str, Any]:
    fixed = {
        "rank": counts,
        "selector": st.sampled_from(["trained", "frozen"]),
        "scaling": st.sampled_from(["none", "linear", "quadratic"]),
        **task_losses,
    }
    return draw_all(draw, fixed)


@st.composite
def tucka_fields(draw: st.DrawFn) -> dict[str, Any]:
    fixed = {
        "rank": counts,
        "groups": counts,
        "experts": counts,
        "shared_rank": counts,
        "routing": st.sampled_from(["batch", "row"]),
        "mean": st.sampled_from(["real", "all"]),
        "choice": st.sampled_from(["affinity", "normalised"]),
    }
    return draw_all(draw, fixed)


FIELDS = {
    "ept": ept_fields(),
    "mixlora": mixlora_fields(),
    "moelora": moelora_fields(),
    "more": more_fields(),
    "tucka": tucka_fields(),
}


@st.composite
def cases(draw: st.DrawFn, name: str) -> dict[str, Any]:
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
    return {"config": draw(FIELDS[name]), **draw_all(draw, shape)}


def run(model: nn.Module, adapters: moepeft.Attachment, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, auxiliary loss and all gradients; a parameter that nothing reached has a gradient of zero."""
    x = inputs["x"].clone().requires_grad_()
    output = model(**{**inputs, "x": x})
    aux = adapters.aux_loss()
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    ((output * weights).sum() + aux).backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in adapters.named_parameters()}
    assert x.grad is not None
    return {"output": output.detach(), "aux": aux.detach(), "x": x.grad, **gradients}


def case_inputs(case: dict[str, Any], *, several_tasks: bool) -> dict[str, Tensor]:
    rows, length = case["rows"], case["length"]
    if case["grid"]:
        x, positions = torch.randn(rows, length, 2, case["width"]).transpose(1, 2), 2 * length
    else:
        x, positions = torch.randn(rows, length, case["width"]), length
    inputs = {"x": x, "task_ids": torch.randint(0, TASKS, (rows, 2) if several_tasks else (rows,))}
    if several_tasks:
        inputs["task_ids"][::2, 1] = -1  # rows of one task among rows of two
    if case["masked"]:
        real = torch.randint(1, positions + 1, (rows, 1))
        inputs["attention_mask"] = (torch.arange(positions) < real).long()
    return inputs


@pytest.fixture(autouse=True)
def _double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def compare(name: str, case: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(case["seed"])
    factory = moepeft.method(name, **case["config"])
    twin = NAIVE[name](factory)
    bare = Stack(case["depth"], case["width"], case["inner"], gated=case["gated"]).train()
    models = bare, copy.deepcopy(bare)
    fast, naive = (moepeft.attach(model, each) for model, each in zip(models, (factory, twin), strict=True))
    assert {type(module) for module in fast.adapters.values()}.isdisjoint(type(m) for m in naive.adapters.values())
    inputs = case_inputs(case, several_tasks=name == "moelora" and case["several_tasks"])
    with torch.no_grad():
        models[0](**inputs)  # draws that wait for data happen now, and both have the same
        for parameter in fast.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    naive.load_state_dict(fast.state_dict())
    found = run(models[0], fast, inputs)
    in_order = {**inputs, "x": inputs["x"].flatten(1, -2)}  # what a naive path reads
    return {**found, **{what: found[what].flatten(1, -2) for what in ("output", "x")}}, run(models[1], naive, in_order)


@pytest.mark.parametrize("name", NAIVE)
def test_fast_equals_naive(name: str) -> None:
    @settings(max_examples=75, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(name))
    def check(case: dict[str, Any]) -> None:
        fast, naive = compare(name, case)
        assert fast.keys() == naive.keys()
        for what, expected in naive.items():
            torch.testing.assert_close(
                fast[what], expected, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text, what=what: f"{what}: {text}"
            )

    check()


@pytest.mark.parametrize("name", NAIVE)
def test_the_cases_reach_every_parameter(name: str) -> None:
    """The cases are not degenerate: adapters change the output, and every kind of parameter gets a gradient."""
    case: dict[str, Any] = {
        "config": {"num_tasks": TASKS} if hasattr(moepeft.method(name), "num_tasks") else {},
        "depth": 2,
        "width": 13,
        "inner": 17,
        "gated": True,
        "rows": 12,
        "length": 6,
        "masked": True,
        "grid": False,
        "several_tasks": False,
        "seed": 1,
    }
    fast, naive = compare(name, case)
    reached: dict[str, bool] = {}
    for what, value in naive.items():
        kind = what.partition("_proj.")[2] or what  # an expert that no task chose at one site is chosen at another
        reached[kind] = reached.get(kind, False) or bool(value.any())
    assert all(reached.values()) or [kind for kind, any_value in reached.items() if not any_value] == ["aux"]
    torch.testing.assert_close(fast, naive, rtol=TOLERANCE, atol=TOLERANCE)
