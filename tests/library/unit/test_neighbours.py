"""Several trained adapters of one model: one after the other, and side by side."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import moepeft
from moepeft.errors import AdapterFileError, AlreadyAttached, MissingRouting, NotMergeable, Unsupported
from tests.support.hosts import batch, build, output

IDS = torch.tensor([0, 1, 1, 0])


def moved(adapters: moepeft.Attachment, seed: int) -> moepeft.Attachment:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapters


# ---------------------------------------------------------------------- one after the other


@pytest.mark.parametrize("spec", ["lora", "more@released", "ept"])
def test_switch_replaces_values_in_place(spec: str, tmp_path: Path) -> None:
    model = build("bert")
    inputs, expected = batch(model), {}
    by_task = spec != "lora"
    for seed, name in enumerate("ab"):
        adapters = moved(moepeft.attach(model, moepeft.method(spec, num_tasks=2)), seed)
        expected[name] = output(model, inputs, task_ids=IDS)
        adapters.save(tmp_path / name)
        adapters.detach()
    adapters = moepeft.load(model, tmp_path / "a")
    parameters = [*adapters.parameters()]
    for name in "bab":
        adapters.switch(tmp_path / name)
        assert torch.equal(output(model, inputs, task_ids=IDS), expected[name])
    assert all(one is other for one, other in zip(parameters, adapters.parameters(), strict=True))

    adapters.merge(**({"task": 1} if by_task else {}))
    with pytest.raises(NotMergeable, match="switch"):
        adapters.restore(tmp_path / "a")
    adapters.switch(tmp_path / "a")
    merged = output(model, inputs)
    torch.testing.assert_close(merged[1], expected["a"][1], rtol=1e-4, atol=1e-5)
    other = moepeft.attach(build("bert"), moepeft.method(spec, num_tasks=2, rank=3))
    other.save(tmp_path / "c")
    with pytest.raises(AdapterFileError, match="another config"):
        adapters.switch(tmp_path / "c")
    assert torch.equal(output(model, inputs), merged)
    adapters.unmerge()
    assert torch.equal(output(model, inputs, task_ids=IDS), expected["a"])


# ---------------------------------------------------------------------- side by side

PARTS: dict[str, tuple[str, list[str]]] = {
    "moelora": ("moelora", ["q", "v"]),
    "ept": ("ept", ["up", "down"]),
    "lora": ("lora", ["k", "o"]),
}


def side_by_side(model: nn.Module, names: Any = PARTS) -> dict[str, moepeft.Attachment]:
    found = {}
    for name in names:
        spec, sites = PARTS[name]
        found[name] = moved(moepeft.attach(model, moepeft.method(spec, num_tasks=2), sites=sites), len(name))
    return found


@pytest.fixture
def together() -> dict[str, moepeft.Attachment]:
    return side_by_side(build("bert"))


def test_each_is_saved_and_loaded_on_its_own(together: dict[str, moepeft.Attachment], tmp_path: Path) -> None:
    model = together["lora"].model
    inputs = batch(model, padded=2)
    expected = output(model, inputs, task_ids=IDS)
    for name, adapters in together.items():
        adapters.save(tmp_path / name)
        assert {site.role for site in adapters.sites} == set(PARTS[name][1])
        count = adapters.parameter_count()
        assert count.total == count.closed_form
        assert count.base == sum(p.numel() for p in build("bert").parameters())
    for order in itertools.permutations(PARTS):
        fresh = build("bert")
        for name in order:
            moepeft.load(fresh, tmp_path / name)
        assert torch.equal(output(fresh, inputs, task_ids=IDS), expected)


@pytest.mark.parametrize("order", itertools.permutations(PARTS))
def test_they_leave_in_every_order(order: tuple[str, ...], together: dict[str, moepeft.Attachment]) -> None:
    model = together["lora"].model
    inputs = batch(model)
    left = dict(together)
    for name in order:
        left.pop(name).detach()
        alone = build("bert")
        side_by_side(alone, left)
        assert torch.equal(output(model, inputs, task_ids=IDS), output(alone, inputs, task_ids=IDS))
        assert len(moepeft.attachments(model)) == len(left)
        trainable = {id(p) for p in model.parameters() if p.requires_grad}
        assert not left or trainable == {id(p) for adapters in left.values() for p in adapters.parameters()}
    bare = build("bert")
    assert model.state_dict().keys() == bare.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in vars(module) or "moepeft_entry" in vars(module) for module in model.modules())


def test_they_merge_in_every_order(together: dict[str, moepeft.Attachment]) -> None:
    model = together["lora"].model
    inputs = batch(model)
    routed = output(model, inputs, task_ids=torch.ones(4, dtype=torch.long))
    for order in itertools.permutations(PARTS):
        for name in order:
            together[name].merge(**({} if name == "lora" else {"task": 1}))
            torch.testing.assert_close(output(model, inputs, task_ids=[1] * 4), routed, rtol=1e-4, atol=1e-5)
        for name in order:
            together[name].unmerge()
        assert torch.equal(output(model, inputs, task_ids=[1] * 4), routed)
    together["moelora"].merge_and_detach(task=1)
    together["ept"].merge_and_detach(task=1)
    together["lora"].merge_and_detach()
    torch.testing.assert_close(output(model, inputs), routed, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == build("bert").state_dict().keys()


def test_each_is_routed_and_disabled_on_its_own(together: dict[str, moepeft.Attachment]) -> None:
    model = together["lora"].model
    inputs = batch(model)
    with together["moelora"].route(task_ids=0), together["ept"].route(task_ids=1):
        mixed = output(model, inputs)
        with pytest.raises(MissingRouting, match="task ids"), together["ept"].route(task_ids=[0, 1, 1]):
            output(model, inputs)
    with pytest.raises(MissingRouting, match="no task ids"), together["ept"].route(task_ids=1):
        output(model, inputs)
    assert not torch.equal(mixed, output(model, inputs, task_ids=[0] * 4))
    alone = build("bert")
    side_by_side(alone, ["moelora", "lora"])
    with together["ept"].disabled():
        assert torch.equal(output(model, inputs, task_ids=IDS), output(alone, inputs, task_ids=IDS))
    model.train()(**inputs, task_ids=IDS)
    assert {name: bool(adapters.aux_losses()) for name, adapters in together.items()} == {
        "moelora": False,
        "ept": True,
        "lora": False,
    }


def test_recomputed_blocks_serve_all_of_them(together: dict[str, moepeft.Attachment]) -> None:
    model: Any = together["lora"].model.double()
    inputs = batch(model, padded=2)
    parameters = [p for adapters in together.values() for p in adapters.parameters()]
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    gradients: list[tuple[Tensor, ...]] = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = output(model, inputs, task_ids=IDS).square().mul(torch.arange(32)).mean()
        gradients.append(torch.autograd.grad(loss + together["ept"].aux_loss(), parameters))
        output(model, inputs, task_ids=1 - IDS)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    together["moelora"].detach()
    loss = output(model, inputs, task_ids=IDS).square().mul(torch.arange(32)).mean()
    (loss + together["ept"].aux_loss()).backward()
    assert all(p.grad is not None for name in ("lora", "ept") for p in together[name].parameters())


def test_copies_have_attachments_of_their_own(together: dict[str, moepeft.Attachment]) -> None:
    model = together["lora"].model
    inputs = batch(model)
    expected = output(model, inputs, task_ids=IDS)
    copied = copy.deepcopy(model)
    assert [other.factory.name for other in moepeft.attachments(copied)] == ["moelora", "ept", "lora"]
    for adapters in moepeft.attachments(copied):
        adapters.detach()
    assert torch.equal(output(model, inputs, task_ids=IDS), expected)


def test_a_head_belongs_to_whoever_trains_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes)).eval()
    first = moepeft.attach(model, moepeft.method("lora"), sites=["q"], train=[])
    second = moepeft.attach(model, moepeft.method("lora"), sites=["v"], train=["classifier"])
    assert first.parameter_count().beside == 0
    assert second.parameter_count().beside == model.classifier.weight.numel() + 2
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    second.save(tmp_path)
    assert (tmp_path / "trained.safetensors").is_file()
    second.detach()
    assert not model.classifier.weight.requires_grad
    first.detach()
    assert model.classifier.weight.requires_grad


def test_what_layers_share_outlives_whoever_came_first() -> None:
    """DeBERTa's attention tells rows from its table for both, and networks are not computed in chunks for either."""
    model: Any = build("deberta")
    inputs = batch(model)
    first = moved(moepeft.attach(model, moepeft.method("moelora", num_tasks=2), sites=["query_proj"]), 0)
    second = moved(moepeft.attach(model, moepeft.method("moelora", num_tasks=2), sites=["key_proj"]), 1)
    mixed = output(model, inputs, task_ids=IDS)
    first.detach()
    alone = build("deberta")
    moved(moepeft.attach(alone, moepeft.method("moelora", num_tasks=2), sites=["key_proj"]), 1)
    assert not torch.equal(output(model, inputs, task_ids=IDS), mixed)
    assert torch.equal(output(model, inputs, task_ids=IDS), output(alone, inputs, task_ids=IDS))
    second.detach()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())

    model = build("bert")
    for layer in model.encoder.layer:
        layer.chunk_size_feed_forward = 1
    first = moepeft.attach(model, moepeft.method("lora"), sites=["up"])
    second = moepeft.attach(model, moepeft.method("lora"), sites=["down"])
    first.detach()
    assert {layer.chunk_size_feed_forward for layer in model.encoder.layer} == {0}
    second.detach()
    assert {layer.chunk_size_feed_forward for layer in model.encoder.layer} == {1}


def test_what_stands_in_each_others_way_is_refused(together: dict[str, moepeft.Attachment]) -> None:
    model = together["lora"].model
    with pytest.raises(AlreadyAttached, match=r"attention\.self\.query"):
        moepeft.attach(model, moepeft.method("lora"))
    with pytest.raises(AlreadyAttached):
        moepeft.attach(model, moepeft.method("lora"), sites=["q"])
    with pytest.raises(AlreadyAttached, match="part"):
        moepeft.attach(model.encoder, moepeft.method("lora"))  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="3 attachments"):
        moepeft.attachment(model)
    together["ept"].detach()
    with pytest.raises(Unsupported, match="detached"):
        _ = together["ept"].factory
