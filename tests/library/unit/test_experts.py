"""Experts of mixtures that transformers fuses to one parameter: adapted, routed, trained, merged, saved and left."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import moepeft
from moepeft.errors import NotMergeable, Unsupported
from tests.support.hosts import batch

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "num_experts_per_tok": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
HOSTS: dict[str, Any] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=12, num_experts=4, head_dim=8)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4)),
    # Matrices stored (in, out), with biases, gate and up interleaved.
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, head_dim=8)),
}
IDS = torch.tensor([0, 1, 2, 1])
BY_TASK = ["moelora", "more", "ept", "mtl-lora", "lora-per-task"]


def host(name: str) -> Any:
    torch.manual_seed(0)
    model = HOSTS[name]().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model


def precise(name: str) -> Any:
    model = host(name).double()
    model.config._experts_implementation = "eager"  # the grouped product knows no double precision
    return model


def attached(model: Any, spec: str, sites: Any = ("experts", "q"), **fields: Any) -> moepeft.Attachment:
    torch.manual_seed(1)
    adapters = moepeft.attach(model, moepeft.method(spec, num_tasks=3, **fields), sites=sites)
    model.double()
    return adapters


def moved(adapters: moepeft.Attachment) -> moepeft.Attachment:
    torch.manual_seed(2)
    for parameter in adapters.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64))
    return adapters


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *(("mixtral", spec) for spec in ("lora", *BY_TASK)),
        *(("qwen3_moe", spec) for spec in ("lora", "ept")),
    ],
)
def test_experts_train_merge_save_and_load(name: str, spec: str, tmp_path: Path) -> None:
    model = precise(name)
    inputs = batch(model)
    bare = model(**inputs).logits
    adapters = attached(model, spec)
    torch.testing.assert_close(model(**inputs, task_ids=IDS).logits, bare, rtol=1e-10, atol=1e-10)
    count = adapters.parameter_count()
    assert count.total == count.closed_form
    assert f"{count.experts:,} of them, {count.experts / count.total:.0%}, in experts" in adapters.summary()

    seen = set()
    experts = model.model.layers[0].mlp.experts
    hook = experts.register_forward_pre_hook(lambda module, args: seen.update(args[1].unique().tolist()))
    optimiser = torch.optim.AdamW(adapters.parameters(), lr=0.05)
    losses = []
    model.train()
    for step in range(5):
        loss = model(**inputs, task_ids=IDS, labels=inputs["input_ids"]).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        (loss + adapters.aux_loss()).backward()
        if step == 1:
            reached = {
                site.fused.expert
                for site in adapters.sites
                if site.fused and all(getattr(adapters.adapters[site.name], each).grad.abs().max() for each in "AB")
            }
        optimiser.step()
    hook.remove()
    assert losses[-1] < losses[0] - 0.002
    assert seen
    assert reached == seen

    routed = model.eval()(**inputs, task_ids=IDS).logits
    for row, task in enumerate(IDS[:3].tolist()):
        adapters.merge(**({"task": task} if spec in BY_TASK else {}))
        assert getattr(experts.forward, "func", None) is None  # the bare model's speed
        merged = model(input_ids=inputs["input_ids"][row : row + 1]).logits[0]
        torch.testing.assert_close(merged, routed[row], rtol=1e-9, atol=1e-10)
        adapters.unmerge()
    adapters.save(tmp_path)
    adapters.detach()
    assert torch.equal(model(**inputs).logits, bare)
    assert not any("moepeft" in key for key in model.state_dict())

    fresh = precise(name)
    again = moepeft.load(fresh, tmp_path)
    fresh.double()
    again.restore(tmp_path)  # the first load was to float32
    assert torch.equal(fresh(**inputs, task_ids=IDS).logits, routed)
    again.merge_and_detach(**({"task": 1} if spec in BY_TASK else {}))
    assert fresh.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(fresh(**inputs).logits[1], routed[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", HOSTS)
def test_the_fused_experts_are_what_the_model_computes(name: str) -> None:
    """In the model's own way of computing, with its kind of biases and layouts; merging writes into the weights."""
    model = host(name)
    inputs = batch(model)
    bare = model(**inputs).logits
    adapters = moepeft.attach(model, moepeft.method("lora"), sites=["experts"])
    assert len(adapters.sites) == 8
    torch.testing.assert_close(model(**inputs).logits, bare, rtol=1e-4, atol=1e-4)
    for parameter in adapters.parameters():
        parameter.data.normal_(std=0.1)
    routed = model(**inputs).logits
    assert not torch.allclose(routed, bare, atol=1e-2)
    adapters.merge()
    torch.testing.assert_close(model(**inputs).logits, routed, rtol=1e-3, atol=1e-3)
    adapters.unmerge()
    with adapters.disabled():
        assert torch.equal(model(**inputs).logits, bare)


def test_lora_on_experts_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft")
    inputs = batch(precise("mixtral"))
    ours, theirs = precise("mixtral"), precise("mixtral")
    adapters = moved(attached(ours, "lora", ["experts"], rank=2, alpha=6.0))
    config = peft.LoraConfig(
        r=2, lora_alpha=6.0, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    model = peft.get_peft_model(theirs, config).double()
    factors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    widths = {tuple(p.shape): (name, p) for name, p in factors.items()}
    for parameter, (into, out) in {"gate_up_proj": (16, 48), "down_proj": (24, 16)}.items():
        own: list[Any] = [adapters.adapters[f"model.layers.0.mlp.experts.{e}.{parameter}"] for e in range(4)]
        _, A = widths[8, into]
        _, B = widths[out, 8]
        A.data = torch.cat([adapter.A for adapter in own])
        B.data = torch.stack([adapter.B for adapter in own], dim=2).flatten(1)  # (out, rank, experts)
    logits, expected = ours(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    logits.square().sum().backward()
    expected.square().sum().backward()
    A = widths[8, 16][1].grad.unflatten(0, (4, 2))
    for e in range(4):
        adapter: Any = adapters.adapters[f"model.layers.0.mlp.experts.{e}.gate_up_proj"]
        torch.testing.assert_close(adapter.A.grad, A[e], rtol=1e-8, atol=1e-10)


def test_tokens_of_an_expert_have_the_tasks_of_their_rows() -> None:
    """Mixed rows equal rows apart, packed rows equal sequences apart, blocks computed again equal themselves."""
    model = precise("mixtral")
    adapters = moved(attached(model, "lora-per-task"))
    inputs = batch(model, padded=3)
    mixed = model(**inputs, task_ids=IDS).logits
    for row in range(4):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        torch.testing.assert_close(model(**alone, task_ids=IDS[row : row + 1]).logits[0], mixed[row])

    ids = inputs["input_ids"][:1]
    blocks = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(4, 4).tril()).bool()[None, None]
    where = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    tasks = torch.tensor([[2, 2, 2, 0, 0, 0, 0]])
    packed = model(input_ids=ids, attention_mask=blocks, position_ids=where, task_ids=tasks).logits
    torch.testing.assert_close(packed[:, :3], model(input_ids=ids[:, :3], task_ids=[2]).logits)
    torch.testing.assert_close(packed[:, 3:], model(input_ids=ids[:, 3:], task_ids=[0]).logits)

    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model.train()(**inputs, task_ids=IDS, use_cache=False).logits.square().mean()
        gradients.append(torch.autograd.grad(loss, list(adapters.parameters()), allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_generation_and_copies_route_experts_as_well() -> None:
    model = precise("mixtral")
    adapters = moved(attached(model, "moelora"))
    ids = batch(model)["input_ids"]
    with adapters.route(task_ids=IDS):
        beams = model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False)
    with adapters.route(task_ids=2):
        alone = model.generate(ids[2:3], max_new_tokens=3, num_beams=2, do_sample=False)
    assert torch.equal(beams[2:3], alone)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids, task_ids=IDS).logits, model(ids, task_ids=IDS).logits)
    moepeft.attachment(copied).detach()
    assert not torch.equal(copied(ids).logits, model(ids, task_ids=IDS).logits)
    assert len(moepeft.attachment(model).sites) == 9


@pytest.mark.parametrize("spec", ["hydralora", "tucka", "mola"])
def test_methods_that_must_know_rows_leave_experts_out_and_say_so(spec: str) -> None:
    model = host("mixtral")
    adapters = moepeft.attach(model, moepeft.method(spec), sites=["q", "v", "down", "up"])
    assert {site.role for site in adapters.sites} <= {"q", "v"}
    assert "8 x an expert's matrix, which gets tokens without their rows" in adapters.summary()


def test_what_experts_cannot_do_is_refused(tmp_path: Path) -> None:
    from moepeft.bridges.peft_checkpoints import export_lora

    model = host("mixtral")
    with pytest.raises(Unsupported, match=r"none of the chosen.*tokens without their rows"):
        moepeft.attach(model, moepeft.method("mixlora"), sites=["experts"])
    with pytest.warns(UserWarning, match="experts"):
        moepeft.attach(model, moepeft.method("lora")).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an expert without tokens is no layer that the model does not use
        adapters = moepeft.attach(model, moepeft.method("lora"), sites=["experts"])
        model.train()(input_ids=torch.tensor([[5]]))
    with pytest.raises(Unsupported, match="experts"):
        export_lora(adapters, tmp_path)
    adapters.detach()
    model.tied = nn.Module()
    model.tied.same = model.model.layers[0].mlp.experts.down_proj
    with pytest.raises(NotMergeable, match=r"tied\.same"):
        moepeft.attach(model, moepeft.method("lora"), sites=["experts"]).merge()


def test_only_some_experts() -> None:
    model = precise("mixtral")
    adapters = moved(attached(model, "lora", r".*experts\.[02]\.down_proj"))
    assert [site.fused and site.fused.expert for site in adapters.sites] == [0, 2]
    inputs: dict[str, Tensor] = batch(model)
    routed = model(**inputs).logits
    adapters.merge()
    torch.testing.assert_close(model(**inputs).logits, routed)
