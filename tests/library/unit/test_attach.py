"""The attachment itself: misuse is loud, other libraries' hooks survive, models do not see each other's routes."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

import moepeft
from moepeft.errors import AlreadyAttached, ConfigError, MissingRouting, NotMergeable, Unsupported
from tests.support.hosts import HOSTS, batch, build, output

IDS = torch.arange(4)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_equals_the_peft_package_to_the_last_bit(host: str, rslora: bool) -> None:
    ours, theirs = build(host).double(), build(host).double()
    adapters = moepeft.attach(ours, moepeft.method("lora", rank=4, alpha=16, rslora=rslora))
    ours.double()
    names = [site.name for site in adapters.sites]
    config = peft.LoraConfig(r=4, lora_alpha=16, use_rslora=rslora, target_modules=names)
    wrapped = peft.get_peft_model(theirs, config).double()
    for name, adapter in adapters.adapters.items():
        layer = wrapped.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(adapter.A)
        adapter.B.data.normal_()
        layer.lora_B["default"].weight.data.copy_(adapter.B)
    inputs = batch(ours, padded=2)
    mine, reference = output(ours, inputs), output(wrapped, inputs)
    assert torch.equal(mine, reference)
    mine.square().sum().backward()
    reference.square().sum().backward()
    for name, adapter in adapters.adapters.items():
        layer = wrapped.base_model.model.get_submodule(name)
        assert torch.equal(adapter.A.grad, layer.lora_A["default"].weight.grad)
        assert torch.equal(adapter.B.grad, layer.lora_B["default"].weight.grad)


def test_lora_starts_as_the_peft_package_does() -> None:
    """Same distribution: uniform in +-1/sqrt(in), B zero."""
    model = nn.Sequential(nn.Linear(400, 30))
    adapter = moepeft.attach(model, moepeft.method("lora", rank=100)).adapters["0"]
    assert adapter.A.abs().max() <= 400**-0.5
    assert adapter.A.std().item() == pytest.approx((400 * 3) ** -0.5, rel=0.02)
    assert not adapter.B.any()


def test_attaching_twice_is_refused() -> None:
    model = build("bert")
    adapters = moepeft.attach(model, moepeft.method("lora"))
    with pytest.raises(AlreadyAttached, match="detach"):
        moepeft.attach(model, moepeft.method("lora"))
    with pytest.raises(AlreadyAttached):
        moepeft.attach(nn.ModuleList([model]), moepeft.method("lora"))
    adapters.detach()
    moepeft.attach(model, moepeft.method("lora"))
    with pytest.raises(Unsupported, match="carries no adapters"):
        moepeft.attachment(build("bert"))


def test_detach_restores_which_parameters_trained() -> None:
    model = build("bert")
    model.embeddings.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    moepeft.attach(model, moepeft.method("mixlora")).detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_two_forms_of_routing_agree_and_the_call_wins() -> None:
    model = build("llama")
    adapters = moepeft.attach(model, moepeft.method("moelora", num_tasks=4))
    for adapter in adapters.adapters.values():
        adapter.B.data.normal_()
    inputs = batch(model)
    called = output(model, inputs, task_ids=IDS)
    with adapters.route(task_ids=IDS):
        assert torch.equal(output(model, inputs), called)
        assert torch.equal(output(model, inputs, task_ids=IDS.flip(0)), output(model, inputs, task_ids=IDS.flip(0)))
        assert not torch.equal(output(model, inputs, task_ids=IDS.flip(0)), called)
    with adapters.route(task_ids=[0, 1, 2, 3]):
        assert torch.equal(output(model, inputs), called)
    with pytest.raises(MissingRouting):
        output(model, inputs)
    with pytest.raises(MissingRouting, match="num_tasks=4"), adapters.route(task_ids=[4]):
        pass


def test_a_merged_model_serves_its_task_only() -> None:
    model = build("bert")
    adapters = moepeft.attach(model, moepeft.method("moelora", num_tasks=4))
    with pytest.raises(MissingRouting, match=r"merge\(task=\.\.\.\)"):
        adapters.merge()
    with pytest.raises(NotMergeable, match="without a merge"):
        adapters.unmerge()
    adapters.merge(task=2)
    assert adapters.merged
    with pytest.raises(NotMergeable, match=r"unmerge\(\) first"):
        adapters.merge(task=1)
    output(model, batch(model), task_ids=torch.full((4,), 2))
    with pytest.raises(MissingRouting, match="task 2 is merged"):
        output(model, batch(model), task_ids=IDS)
    adapters.detach()
    assert torch.equal(output(model, batch(model)), output(build("bert"), batch(model)))


def test_merging_refuses_values_that_are_not_finite() -> None:
    model = build("bert")
    adapters = moepeft.attach(model, moepeft.method("lora"))
    last = list(adapters.adapters.values())[-1]
    last.B.data.fill_(float("inf"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotMergeable, match="not finite"):
        adapters.merge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_accelerate_hook_still_runs_beneath() -> None:
    calls = []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):  # type: ignore[no-untyped-def]
            calls.append(module)
            return args, kwargs

    model = build("bert")
    layer = model.encoder.layer[0].attention.self.query
    add_hook_to_module(layer, Counting())
    hooked = layer.forward
    adapters = moepeft.attach(model, moepeft.method("lora"))
    output(model, batch(model))
    assert calls == [layer]
    adapters.detach()
    assert layer.forward == hooked


def test_threads_on_two_models_do_not_mix_routes() -> None:
    models, expected, results = [], [], [None, None]
    for task in range(2):
        model = build("llama")
        adapters = moepeft.attach(model, moepeft.method("moelora", num_tasks=4))
        for adapter in adapters.adapters.values():
            adapter.B.data.fill_(0.1)
        models.append(adapters)
        expected.append(output(model, batch(model), task_ids=torch.full((4,), task)))

    def serve(task: int) -> None:
        with models[task].route(task_ids=task):
            for _ in range(10):
                results[task] = output(models[task].model, batch(models[task].model))

    threads = [threading.Thread(target=serve, args=(task,)) for task in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))


def test_an_interrupted_forward_leaves_no_trace() -> None:
    model = build("t5")
    adapters = moepeft.attach(model, moepeft.method("ept", num_tasks=4))
    with pytest.raises(MissingRouting):
        output(model, batch(model))
    assert adapters.runtime.forward is None
    output(model, batch(model), task_ids=IDS)


def test_layers_that_no_training_forward_reaches_are_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.used(x)
            return output

    half = Half().train()
    moepeft.attach(half, moepeft.LoRA())
    with pytest.warns(UserWarning, match="1 of 2 adapted layers did not run"):
        half(torch.randn(2, 4, requires_grad=True))


def test_summary_says_what_is_there() -> None:
    adapters = moepeft.attach(build("bert"), moepeft.method("moelora", num_tasks=4))
    text = adapters.summary()
    assert "MOELoRA(rank=16" in text
    assert "12 sites: q x 2, k x 2, v x 2, o x 2, up x 2, down x 2" in text
    assert f"{sum(p.numel() for p in adapters.parameters()):,} trainable parameters, 768 of them shared" in text


@pytest.mark.slow
@pytest.mark.parametrize("words", [*moepeft.available(), "ept@released", "more@released", "ept definition"])
def test_compiles_without_a_graph_break_for_rows_and_lengths_that_change(words: str) -> None:
    """In a process of its own: the compiler cannot trace what checks the shapes in this one."""
    command = [sys.executable, "-m", "tests.support.compiles", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mixlora", "flylora"])
def test_a_compiled_model_meets_new_masks_without_compiling_again(method: str) -> None:
    """Of methods that lay the mask on tokens, and that count tokens for the next step."""
    command = [sys.executable, "-m", "tests.support.compiles", method, "masks"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ept", "mixlora", "tucka"])
def test_a_compiled_model_decodes_two_texts_in_turn_with_static_caches(method: str) -> None:
    command = [sys.executable, "-m", "tests.support.compiles", method, "cache"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("factory", ["ept", moepeft.LoRA, None, {"rank": 8}])
def test_what_is_no_configured_method_is_refused_before_the_model_is_touched(factory: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    attach = inspect.unwrap(moepeft.attach)  # users have no checks of types, which the tests put before it
    with pytest.raises(ConfigError, match="no configured method"):
        attach(model, factory)
    assert all(parameter.requires_grad for parameter in model.parameters())
