"""What was made or set before a change is not used after it: inputs, routes, weights, values, forwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import moepeft
from moepeft.errors import AdapterFileError, MissingRouting, NotMergeable

WIDTH = 32


class Residuals(nn.Module):
    """Layers whose outputs are added to their input, in place or not."""

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for layer in self.layers:
            added = torch.tanh(layer(x))
            x = x.add_(added) if self.in_place else x + added
        return x


def adapt(model: nn.Module, spec: str, **more: Any) -> moepeft.Attachment:
    """An attachment with values of its own, in training's middle."""
    adapters = moepeft.attach(model.eval(), moepeft.method(spec, num_tasks=2), **more)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapters


# ---------------------------------------------------------------------- inputs


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("spec", ["ept", "more", "moelora", "tucka", "lora", "hydralora", "adamole", "smora"])
def test_an_input_that_changed_in_place_is_another_input(spec: str, mode: Any) -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 4, WIDTH)
    with mode():
        found = [adapt(Residuals(in_place=in_place), spec).model(x, task_ids=[0, 1]) for in_place in (False, True)]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- merging


def test_a_route_of_before_the_merge_is_held_against_the_merged_task() -> None:
    adapters = adapt(Residuals(), "moelora")
    x = torch.randn(2, 4, WIDTH)
    with adapters.route(task_ids=[1, 1]):
        adapters.merge(task=0)
        with pytest.raises(MissingRouting, match="task 0 is merged"):
            adapters.model(x)
    with adapters.route(task_ids=[0, 0]):
        adapters.model(x)


def test_inside_of_disabled_nothing_is_merged_or_unmerged(tmp_path: Path) -> None:
    adapters = adapt(Residuals(), "lora")
    adapters.save(tmp_path)
    x = torch.randn(2, 4, WIDTH)
    adapted = adapters.model(x)
    with adapters.disabled(), pytest.raises(NotMergeable, match=r"merge\(\) inside of disabled\(\)"):
        adapters.merge()
    adapters.merge()
    for change in (adapters.unmerge, adapters.detach, lambda: adapters.switch(tmp_path)):
        with adapters.disabled(), pytest.raises(NotMergeable, match=r"unmerge\(\) inside of disabled\(\)"):
            change()
    with adapters.disabled():
        copied = copy.deepcopy(adapters.model)  # is inside of nothing
    moepeft.attachment(copied).unmerge()
    adapters.unmerge()
    torch.testing.assert_close(adapters.model(x), adapted, rtol=0, atol=0)
    bare = Residuals()(x)
    torch.testing.assert_close(adapters.detach()(x), bare, rtol=0, atol=0)


def test_a_tied_head_per_task_is_not_merged_over_the_embeddings() -> None:
    config = GPT2Config(vocab_size=50, n_embd=WIDTH, n_layer=1, n_head=4, pad_token_id=0, bos_token_id=1)
    adapters = adapt(GPT2LMHeadModel(config), "moelora", train_per_task=["lm_head"])
    embeddings = adapters.model.transformer.wte.weight.clone()  # type: ignore[union-attr, operator]
    with pytest.raises(NotMergeable, match=r"'lm_head' is also that of 'transformer\.wte\.weight'"):
        adapters.merge(task=1)
    assert torch.equal(adapters.model.transformer.wte.weight, embeddings)  # type: ignore[union-attr, arg-type]
    untied = adapt(GPT2LMHeadModel(config), "moelora")
    untied.merge(task=1)


def test_switch_to_values_that_cannot_be_merged_leaves_all_as_it_was(tmp_path: Path) -> None:
    adapters = adapt(Residuals().half(), "lora")
    adapters.save(tmp_path)
    path = tmp_path / "adapter.safetensors"
    save_file({name: torch.full_like(value, 200.0) for name, value in load_file(path).items()}, path)
    adapters.merge()
    before = {name: value.clone() for name, value in adapters.model.state_dict().items()}
    with pytest.raises(NotMergeable, match="not finite"):
        adapters.switch(tmp_path)
    assert adapters.merged
    assert all(torch.equal(value, before[name]) for name, value in adapters.model.state_dict().items())
    adapters.unmerge()


# ---------------------------------------------------------------------- values


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.layers[0](x))
        return output


def test_heads_per_task_of_a_meta_model_begin_as_the_head_that_was_loaded() -> None:
    torch.manual_seed(0)
    base = Headed()
    with torch.device("meta"):
        model = Headed()
        adapters = moepeft.attach(model, moepeft.method("moelora", num_tasks=2), train_per_task=["head"])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(777.0)  # as fresh memory may hold
    model.load_state_dict(base.state_dict(), strict=False)
    adapters.reset_parameters()
    x = torch.randn(2, WIDTH)
    torch.testing.assert_close(model(x, task_ids=[0, 1]), base(x))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_base_of_4_bit_is_the_same_base_whatever_type_stores_it(storage: torch.dtype, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def base(*, quantised: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(64, 64)]), "norm": nn.Linear(64, 64)})
        if quantised:
            layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_storage=storage)
            layer.load_state_dict(model["layers"][0].state_dict())  # type: ignore[index]
            model["layers"][0] = layer  # type: ignore[index, assignment]
        return model.to("cpu")

    for quantised in (True, False):
        adapters = moepeft.attach(base(quantised=quantised), moepeft.LoRA(rank=2), sites=r"layers\..*")
        adapters.save(tmp_path)
        moepeft.load(base(quantised=not quantised), tmp_path)
    other = base(quantised=True)
    with torch.no_grad():
        other["norm"].weight.add_(1.0)  # type: ignore[index, operator]
    with pytest.raises(AdapterFileError):
        moepeft.load(other, tmp_path)


def test_values_are_loaded_whole_and_seen_at_once() -> None:
    adapters = adapt(Residuals(), "lora")
    values = adapters.state_dict()
    with pytest.raises(RuntimeError, match=r"no 'sites\.nonsense'"):
        adapters.load_state_dict({**values, "sites.nonsense": torch.zeros(1)})
    adapters.merge()
    with pytest.raises(NotMergeable, match="would not show"):
        adapters.load_state_dict(values)


def test_a_file_names_a_base_by_no_path(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=WIDTH, n_layer=1, n_head=4))
    model.save_pretrained(tmp_path / "secret" / "base")
    adapters = moepeft.attach(GPT2LMHeadModel.from_pretrained(tmp_path / "secret" / "base"), moepeft.LoRA(rank=2))
    adapters.save(tmp_path / "saved")
    assert "secret" not in (tmp_path / "saved" / "adapter.json").read_text()


def test_tasks_that_have_types_do_not_grow_by_a_number() -> None:
    model = nn.ModuleDict({"up_proj": nn.Linear(WIDTH, WIDTH), "down_proj": nn.Linear(WIDTH, WIDTH)})
    adapters = moepeft.attach(model, moepeft.method("loramoe", types=(0, 1)))
    with pytest.raises(moepeft.errors.Unsupported, match="anew for more tasks"):
        adapters.add_tasks(1)


def test_a_row_of_several_tasks_has_one_at_least() -> None:
    adapters = adapt(Residuals(), "moelora")
    x = torch.randn(2, 4, WIDTH)
    adapters.model(x, task_ids=torch.tensor([[[0, 1]], [[1, -1]]]))
    with pytest.raises(MissingRouting, match="-1 alone"):
        adapters.model(x, task_ids=torch.tensor([[[0, 1]], [[-1, -1]]]))


def test_all_fast_paths_are_all() -> None:
    from moepeft import fast
    from moepeft.methods.moelora import add_experts

    with moepeft.fast_paths(False, of=add_experts):
        assert add_experts in fast._by_definition
        with moepeft.fast_paths(True):
            assert not fast._by_definition
        assert add_experts in fast._by_definition


# ---------------------------------------------------------------------- forwards


class Checkpointed(nn.Module):
    """A block that computes a part of itself again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)  # so that no adapted layer gets the block's own input
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.again = False

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = checkpoint(self.network, x, use_reentrant=False) if self.again else self.network(x)
        return x + added

    def network(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(torch.relu(self.up_proj(self.norm(x))))
        return output


def gradients(spec: str, *, again: bool, forwards: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(Checkpointed(), Checkpointed())
    inputs = [torch.randn(2, 3, WIDTH) + shift for shift in (1.0, -1.0)]
    adapters = adapt(model, spec)
    for block in model.train():
        block.again = again  # type: ignore[assignment]
    known = {} if spec == "tucka" else {"task_ids": [0, 1]}
    loss = torch.stack([model(x, **known).square().sum() for x in inputs[:forwards]]).sum() + 0.0 * adapters.aux_loss()
    loss.backward()
    return [torch.zeros(()) if one.grad is None else one.grad for one in adapters.parameters()]


@pytest.mark.parametrize("spec", ["tucka", "moelora", "ept"])
@pytest.mark.parametrize("forwards", [1, 2])
def test_a_part_of_a_block_is_computed_again_as_it_was_or_refused(spec: str, forwards: int) -> None:
    """TuckA's second forward lent its routing to what the first one computed again."""
    expected = gradients(spec, again=False, forwards=forwards)
    if spec == "tucka" and forwards == 2:
        with pytest.raises(MissingRouting, match="another routing"):
            gradients(spec, again=True, forwards=forwards)
        return
    for found, wanted in zip(gradients(spec, again=True, forwards=forwards), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
