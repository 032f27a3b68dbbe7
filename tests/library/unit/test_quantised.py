"""Merging into weights that bitsandbytes quantised: as the peft package does it, and back bit for bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moepeft
from moepeft import LoRA
from moepeft.errors import NotMergeable
from moepeft.weights import EightBit

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:.*rounded again.*", "ignore:.*rounding errors.*")

WIDTH = 128


def four_bit(nested: bool, storage: torch.dtype = torch.uint8) -> nn.Module:
    layer: nn.Module = bnb.nn.Linear4bit(
        WIDTH, WIDTH, quant_type="nf4", compress_statistics=nested, quant_storage=storage
    )
    return layer


def eight_bit() -> nn.Module:
    return bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)  # type: ignore[no-any-return]


KINDS = {
    "4 bit": lambda: four_bit(nested=False),
    "4 bit, nested": lambda: four_bit(nested=True),
    "4 bit, stored as bfloat16": lambda: four_bit(nested=True, storage=torch.bfloat16),
    "8 bit": eight_bit,
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made: Callable[[], nn.Module] = KINDS[request.param]
    return nn.Sequential(made(), nn.ReLU(), made()).to("cpu").requires_grad_(False).train()


def with_update(model: nn.Module, size: float = 0.05) -> moepeft.Attachment:
    adapters = moepeft.attach(model, LoRA(rank=4))
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(std=size)
    return adapters


def numbers(layer: Any) -> Tensor:
    """What the layer computes with, by its own forward."""
    eye = torch.eye(WIDTH, requires_grad=True)
    found: Tensor = layer(eye).detach() - layer.bias
    return found.T


def test_the_merged_weights_are_those_of_peft(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    twin: Any = copy.deepcopy(model)
    kind = type(twin[0]).__name__
    twin.is_loaded_in_4bit, twin.is_loaded_in_8bit = "4bit" in kind, "8bit" in kind  # peft asks the model
    adapters = with_update(model)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["0", "2"], lora_dropout=0.0)
    theirs = peft.get_peft_model(twin, config)
    for name in ("0", "2"):
        layer, own = theirs.base_model.model.get_submodule(name), adapters.adapters[name]
        layer.lora_A["default"].weight.data.copy_(own.A)
        layer.lora_B["default"].weight.data.copy_(own.B)
    adapters.merge_and_detach()
    whole = theirs.merge_and_unload()
    for name in ("0", "2"):
        # As bytes: what is stored as floating-point numbers may look like NaN.
        ours, packed = (each.get_submodule(name).weight.data.view(torch.uint8) for each in (model, whole))
        assert torch.equal(ours, packed)
        assert torch.equal(numbers(model.get_submodule(name)), numbers(whole.get_submodule(name)))


def test_a_quantised_weight_does_not_follow_a_model_that_was_moved() -> None:
    layer = eight_bit()
    kept = EightBit(layer).keep()
    layer.weight = nn.Parameter(torch.empty(WIDTH, WIDTH, device="meta"), requires_grad=False)
    with pytest.raises(NotMergeable, match="merged on cpu and is on meta now: move it back"):
        EightBit(layer).restore(kept)


@torch.no_grad()
def test_unmerged_all_is_as_before(model: nn.Module) -> None:
    x = torch.randn(3, WIDTH)
    bare = model.eval()(x)
    adapters = with_update(model)
    expected = model(x)
    adapters.merge()
    merged = model(x)
    assert not torch.equal(merged, expected)  # it is rounded
    assert (merged - expected).norm() < 0.5 * (expected - bare).norm()
    with adapters.disabled():
        assert torch.equal(model(x), bare)
    assert torch.equal(model(x), merged)
    adapters.unmerge()
    assert torch.equal(model(x), expected)
    adapters.detach()
    assert torch.equal(model(x), bare)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("evaluated", [False, True])
def test_an_evaluation_before_changes_nothing(kind: str, evaluated: bool) -> None:
    """On some CPUs bitsandbytes packs a 4-bit weight when it is first evaluated."""
    torch.manual_seed(0)
    one, other = (nn.Sequential(KINDS[kind]()).to("cpu").requires_grad_(False) for _ in range(2))
    other[0] = copy.deepcopy(one[0])
    if evaluated:
        with torch.no_grad():
            one.eval()(torch.randn(2, WIDTH))
    one.train(), other.train()
    with torch.no_grad():
        update = torch.randn(WIDTH, 4), torch.randn(4, WIDTH)
    for model in (one, other):
        adapters = moepeft.attach(model, LoRA(rank=4))
        adapter: Any = adapters.adapters["0"]
        adapter.B.data.copy_(update[0])
        adapter.A.data.copy_(update[1])
        adapters.merge()
    difference = numbers(one[0]) - numbers(other[0])
    assert difference.norm() < 1e-2 * numbers(other[0]).norm()


def test_a_warning_says_how_much_is_lost(model: nn.Module) -> None:
    """The larger the update, the smaller its share; nothing is said where nothing is quantised."""
    shares = []
    for size in (0.001, 0.1):
        adapters = with_update(model, size)
        with pytest.warns(UserWarning, match="rounding error") as said:
            adapters.merge()
        adapters.detach()
        shares.append(float(str(said[0].message).split("rounding error is ")[1].split(" ")[0]))
    assert shares[0] > 1 > 0.5 > shares[1] > 0
    plain = with_update(nn.Sequential(nn.Linear(4, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.merge()


def test_a_weight_without_an_update_is_not_rounded_again(model: nn.Module) -> None:
    weights = [layer.weight for layer in (model[0], model[2])]  # type: ignore[index]
    adapters = moepeft.attach(model, LoRA(rank=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters.merge_and_detach()
    assert all(layer.weight is weight for layer, weight in zip((model[0], model[2]), weights, strict=True))  # type: ignore[index]


def test_where_warnings_are_errors_the_merge_is_whole(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(3, WIDTH, requires_grad=True)
    adapters = with_update(model)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="rounding error"):
            adapters.merge()
        assert adapters.merged
        merged = model(x)
        adapters.save(tmp_path)  # unmerges and merges again, and says nothing twice
    assert torch.equal(model(x), merged)
    adapters.unmerge()
    assert torch.equal(model(x), expected)


def test_a_merge_that_fails_leaves_the_weights(model: nn.Module) -> None:
    before = [layer.weight for layer in (model[0], model[2])]  # type: ignore[index]
    adapters = with_update(model)
    last: Any = list(adapters.adapters.values())[-1]
    with torch.no_grad():
        last.B.fill_(float("inf"))
    with pytest.raises(NotMergeable, match="not finite"):
        adapters.merge()
    assert all(layer.weight is weight for layer, weight in zip((model[0], model[2]), before, strict=True))  # type: ignore[index]
    assert not adapters.merged
