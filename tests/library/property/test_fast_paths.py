"""Every fast path equals its definition: values, losses and all gradients, over random shapes and configurations."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import moepeft
from moepeft.methods._fast import ept
from moepeft.methods.ept import EPTAdapter
from tests.library.property.configurations import (
    TASKS,
    attach_or_draw_again,
    cases,
    inputs_of,
    network,
    with_several_tasks,
)

TOLERANCE = 1e-10
HOME = Path(moepeft.__file__).parent


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def tied_functions() -> dict[str, Any]:
    """Every definition of the library that has a fast path, by its name."""
    found = {}
    for info in pkgutil.walk_packages(moepeft.__path__, "moepeft."):
        for name, value in vars(importlib.import_module(info.name)).items():
            if hasattr(value, "fast") and hasattr(value, "definition") and value.__module__ == info.name:
                found[f"{info.name}.{name}"] = value
    return found


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


def prepare(case: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network whose adapters are away from their start, as after some training, and inputs for it."""
    model = network(case).train()
    adapters = attach_or_draw_again(model, case["config"])
    inputs = inputs_of(case)
    if "tasks" in case:
        inputs["task_ids"] = (inputs["task_ids"] % case["tasks"]).sort().values
    with torch.no_grad():
        model(**inputs)  # draws that wait for data happen now, and both ways have the same
        for parameter in adapters.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model, with_several_tasks(model, inputs) if case["several_tasks"] else inputs


def both_ways(case: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The case by fast paths, and by definitions."""
    model, inputs = prepare(case)
    results = []
    for wanted in (True, False):
        twin = copy.deepcopy(model)
        with moepeft.fast_paths(wanted):
            results.append(run(twin, moepeft.attachment(twin), inputs))
    return results[0], results[1]


@pytest.mark.parametrize("name", moepeft.available())
def test_fast_paths_equal_definitions(name: str) -> None:
    @settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(name))
    def check(case: dict[str, Any]) -> None:
        fast, defined = both_ways(case)
        for what, expected in defined.items():
            torch.testing.assert_close(
                fast[what], expected, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text, what=what: f"{what}: {text}"
            )

    check()


@pytest.mark.parametrize("wide", [0, 1 << 30], ids=["sorted", "plain"])
def test_both_forms_of_ept_equal_its_definition(wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the widths, which else decide."""
    monkeypatch.setattr(ept, "WIDE", wide)
    test_fast_paths_equal_definitions("ept")
    for shape in ((0, 5), (3, 0), (0,)):
        test_nothing_is_computed_of_nothing("ept", shape, fast=True)
    fast, defined = both_ways(wide_case(moepeft.EPT(num_tasks=TASKS, top_k=1)))
    torch.testing.assert_close(fast, defined, rtol=TOLERANCE, atol=TOLERANCE)


def plain_case(factory: moepeft.AdapterFactory) -> dict[str, Any]:
    """A case in which every part of a method has something to do."""
    sizes = {"depth": 2, "width": 13, "inner": 17, "rows": 12, "length": 6, "seed": 1}
    flags = {"gated": True, "masked": True, "grid": False, "several_tasks": False}
    return {"config": factory, **sizes, **flags}


@pytest.mark.parametrize("name", moepeft.available())
def test_the_cases_reach_every_parameter(name: str) -> None:
    """The cases are not degenerate: adapters change the output, and every kind of parameter gets a gradient."""
    fast, defined = both_ways(plain_case(moepeft.method(name, num_tasks=4)))
    reached: dict[str, bool] = {}
    for what, value in defined.items():
        kind = what.partition("_proj.")[2] or what  # an expert that no task chose at one site is chosen at another
        reached[kind] = reached.get(kind, False) or bool(value.any())
    assert all(reached.values()) or [kind for kind, any_value in reached.items() if not any_value] == ["aux"]
    torch.testing.assert_close(fast, defined, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("gated", [True, False])
def test_each_expert_of_mixlora_multiplies_its_own_tokens_where_there_are_many(gated: bool, top_k: int) -> None:
    case = plain_case(moepeft.MixLoRA(num_experts=8, top_k=top_k, rank=3)) | {"rows": 31, "length": 19, "gated": gated}
    fast, defined = both_ways(case)
    torch.testing.assert_close(fast, defined, rtol=TOLERANCE, atol=TOLERANCE)


def wide_case(factory: moepeft.AdapterFactory, tasks: int = TASKS) -> dict[str, Any]:
    """A case in which a choice of scales saves more than it costs."""
    return plain_case(factory) | {"rows": 31, "length": 19, "width": 232, "inner": 240, "gated": False, "tasks": tasks}


@pytest.mark.parametrize("tasks", [1, TASKS])
def test_ept_multiplies_the_rows_of_a_task_by_its_scales_alone(tasks: int) -> None:
    one, every = (wide_case(moepeft.EPT(num_tasks=TASKS, top_k=top_k), tasks) for top_k in (1, 8))
    fast, defined = both_ways(one)
    torch.testing.assert_close(fast, defined, rtol=TOLERANCE, atol=TOLERANCE)
    frozen = operations_of(wide_case(moepeft.LoRA(rank=1)))
    assert operations_of(one) - frozen < 0.6 * (operations_of(every) - frozen)


@pytest.mark.parametrize(
    "factory", [moepeft.EPT(num_tasks=TASKS, top_k=1), moepeft.MixLoRA()], ids=lambda each: each.name
)
@pytest.mark.parametrize(("autocasts", "length"), [(True, 19), (False, 7)])
def test_many_rows_in_bfloat16_and_with_few_tokens(factory: Any, autocasts: bool, length: int) -> None:
    """Where a CPU multiplies in another way: in 16 bits, and for few tokens a row."""
    model, inputs = prepare(wide_case(factory) | {"rows": 97, "length": length})
    inputs["x"] = inputs["x"].float()
    results = []
    for wanted in (True, False):
        twin = copy.deepcopy(model).float()
        with moepeft.fast_paths(wanted), torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
            results.append(run(twin, moepeft.attachment(twin), inputs))
    for what, expected in results[1].items():
        error = float((results[0][what] - expected).norm() / expected.norm().clamp(min=1e-6))
        assert error < (0.1 if autocasts else 1e-4), what


class StraightThrough(EPTAdapter):
    """Zero gates that have a gradient."""

    def choose(self, logits: Tensor) -> Tensor:
        soft = logits.softmax(dim=-1)
        return super().choose(logits).detach() + soft - soft.detach()


class StraightThroughEPT(moepeft.EPT):
    def build(self, site: moepeft.LinearSite, shared: nn.Module | None) -> nn.Module:
        return StraightThrough(site, self)


def test_gates_of_another_class_keep_their_gradients() -> None:
    fast, defined = both_ways(wide_case(StraightThroughEPT(num_tasks=TASKS, top_k=1)))
    torch.testing.assert_close(fast, defined, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", moepeft.available())
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
@pytest.mark.parametrize("fast", [True, False])
def test_nothing_is_computed_of_nothing(name: str, shape: tuple[int, ...], fast: bool) -> None:
    """A batch without rows, or of rows without tokens, as the last of a process may be."""
    model = network(plain_case(moepeft.method(name)) | {"masked": False})
    adapters = moepeft.attach(model, moepeft.method(name))
    x = torch.zeros(*shape, 13, requires_grad=True)
    with moepeft.fast_paths(fast):
        output = model(x, task_ids=0)
        output.sum().backward()
    assert output.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in adapters.parameters())


def operations_of(case: dict[str, Any]) -> int:
    """Multiplications and additions of a training step."""
    model, inputs = prepare(case)
    with FlopCounterMode(display=False) as counted:
        run(model, moepeft.attachment(model), inputs)
    return counted.get_total_flops()


def called_by(work: Callable[[], object]) -> set[CodeType]:
    """The code of all Python functions that `work` calls, those of backward passes included."""
    seen: set[CodeType] = set()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: seen.add(frame.f_code))
    try:
        work()
    finally:
        sys.setprofile(before)
    return seen


@pytest.mark.slow
def test_every_fast_path_is_used_and_gives_way() -> None:
    """No fast path is dead; none is left where definitions are asked for, nor a definition where they are not."""
    called: dict[bool, set[CodeType]] = {True: set(), False: set()}
    for name in moepeft.available():
        for preset in moepeft.registry.factory_class(name).presets:
            case = plain_case(moepeft.method(f"{name}@{preset}", num_tasks=4))
            if not case["config"].capabilities.batch_first:
                continue
            model, inputs = prepare(case)
            for wanted in (True, False):
                with moepeft.fast_paths(wanted):
                    called[wanted] |= called_by(lambda m=model, i=inputs: run(m, moepeft.attachment(m), i))
    ties = tied_functions()
    assert ties
    for name, tied in ties.items():
        fast, definition = (inspect.unwrap(function).__code__ for function in (tied.fast, tied.definition))
        assert fast in called[True] - called[False], name
        assert definition in called[False] - called[True], name
    files = {
        Path(code.co_filename).relative_to(HOME) for code in called[False] if code.co_filename.startswith(str(HOME))
    }
    assert not [file for file in files if "_fast" in str(file)]
