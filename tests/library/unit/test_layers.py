"""Which layers carry adapters, what is said of the others, and what becomes of layers that change after attach."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    Glm4Config,
    Glm4ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

import moepeft
from moepeft.errors import NoMatchingSite, Unsupported
from moepeft.sites import find_sites, select_sites
from tests.support.hosts import build

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IDS = torch.arange(6, 22).reshape(2, 8)
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
MOE = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32}
FUSED = {
    "modernbert": (lambda: ModernBertModel(ModernBertConfig(**SIZES, **TOKENS)), {"qkv", "o", "up", "down"}),
    "phi3": (
        lambda: Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0, num_key_value_heads=2)),
        {"qkv", "o", "up", "down"},
    ),
    "glm4": (
        lambda: Glm4ForCausalLM(Glm4Config(**SIZES, pad_token_id=0, num_key_value_heads=2, head_dim=8)),
        {"q", "k", "v", "o", "up", "down"},
    ),
    "gptj": (
        lambda: GPTJForCausalLM(GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)),
        {"q", "k", "v", "o", "up", "down"},
    ),
}


def moved(adapters: moepeft.Attachment) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", FUSED)
def test_roles_of_fused_projections_and_a_mixture_over_them(name: str) -> None:
    make, roles = FUSED[name]
    torch.manual_seed(0)
    model: Any = make().eval()
    sites = select_sites(find_sites(model), None)
    assert {site.role for site in sites} == roles
    assert set(Counter(site.block for site in sites if site.block).values()) == {2}
    moved(moepeft.attach(model, moepeft.method("mixlora")))
    with torch.no_grad():
        both, alone = model(IDS)[0], model(IDS[:1])[0]
    assert torch.allclose(both[:1], alone, atol=1e-5)


def test_exclude_takes_what_sites_takes() -> None:
    model = build("llama")
    every = {site.name for site in moepeft.attach(model, moepeft.method("lora")).sites}
    for exclude in (["q", "down_proj"], r".*\.(q_proj|down_proj)", lambda site: site.role in ("q", "down")):
        moepeft.attachment(model).detach()
        kept = moepeft.attach(model, moepeft.method("lora"), exclude=exclude).sites
        assert {site.name for site in kept} == {n for n in every if not n.endswith(("q_proj", "down_proj"))}
    moepeft.attachment(model).detach()
    with pytest.raises(NoMatchingSite, match="'dt_proj'"):
        moepeft.attach(model, moepeft.method("lora"), exclude=["dt_proj"])
    with pytest.raises(NoMatchingSite):
        moepeft.attach(model, moepeft.method("lora"), sites=["q"], exclude=["q"])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_gate_is_left_out_and_named() -> None:
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**MOE, num_experts_per_tok=2, shared_expert_intermediate_size=64))
    with pytest.warns(UserWarning, match=r"expert.*mlp\.experts\.0\.gate_up_proj"):
        adapters = moepeft.attach(model, moepeft.method("ept"))
    assert not any(site.is_gate for site in adapters.sites)
    summary = adapters.summary()
    assert "2 x a gate, 64 numbers, e.g. 'model.layers.0.mlp.shared_expert_gate'" in summary
    assert "'model.layers.0.mlp.experts.0.gate_up_proj'" in summary


class Stack(nn.Module):
    """Matrices of one parameter, whose use nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.matrices = nn.Linear(8, 8), nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) @ self.matrices[0]


def test_several_matrices_of_one_parameter_are_named() -> None:
    summary = moepeft.attach(Stack(), moepeft.method("lora")).summary()
    assert "Stack holds several matrices in one parameter, 192 numbers" in summary


def test_a_warning_says_so_where_most_of_the_blocks_is_not_reached() -> None:
    model = MixtralForCausalLM(MixtralConfig(**MOE))
    with pytest.warns(UserWarning, match=r"8\d% of the matrices in the blocks.*16 x an expert"):
        adapters = moepeft.attach(model, moepeft.method("lora"))
    adapters.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moepeft.attach(model, moepeft.method("lora"), sites=["q", "v"])  # it was asked for


class Hqq(nn.Module):
    """A quantised layer of a kind that nobody knows: features, a packed buffer, no weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("packed", layer.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.packed.T


def test_the_head_alone_is_never_the_default() -> None:
    quantised = build("llama")
    for name, layer in list(quantised.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            quantised.set_submodule(name, Hqq(layer))
    convolutions = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )
    for model, kind in ((quantised, "Hqq"), (convolutions, "classifier")):
        with pytest.raises(Unsupported, match=kind):
            moepeft.attach(model, moepeft.method("lora"))
        assert not any("moepeft" in name for name, _ in model.named_modules())
    assert len(moepeft.attach(quantised, moepeft.method("lora"), sites=["lm_head"]).sites) == 1


def test_adapters_of_peft_are_refused_below_and_carried_above() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    inside = peft.get_peft_model(build("llama"), config)
    with pytest.raises(Unsupported, match="merge_and_unload"):
        moepeft.attach(inside, moepeft.method("lora"))
    adapters = moepeft.attach(inside.merge_and_unload(), moepeft.method("lora"))
    moved(adapters)
    model = adapters.model
    before, names = model(IDS).logits, [name for name, _ in adapters.named_parameters()]
    above = peft.get_peft_model(model, config)
    assert torch.allclose(above(IDS).logits, before, atol=1e-6)
    assert set(adapters.state_dict()) >= set(names)
    above.unload()
    adapters.detach()
    assert not any("moepeft" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("method", ["lora", "tucka", "mixlora"])
def test_layers_replaced_after_attach(method: str) -> None:
    """New embeddings and a new head are no sites; a site that is replaced is named, and detach leaves nothing."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()
    adapters = moepeft.attach(model, moepeft.method(method))
    model.resize_token_embeddings(70)
    model.lm_head = nn.Linear(32, 5)
    model.extra_head = nn.Linear(32, 2)
    assert model(IDS).logits.shape == (2, 8, 5)
    count = adapters.parameter_count()
    assert count.total + count.beside == sum(p.numel() for p in adapters.parameters())
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 64, bias=False)
    with pytest.raises(Unsupported, match=r"layers\.1\.mlp\.up_proj"):
        adapters.state_dict()
    adapters.detach()
    assert not any("moepeft" in name for name, _ in model.named_modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert len(moepeft.attach(model, moepeft.method(method)).sites) == 14


class Careless(nn.Module):
    """Changes what a layer returns in place, calls one by name, and gives another a second argument."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
            return super().forward(x) * scale

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"fc1": nn.Linear(16, 32), "fc2": nn.Linear(32, 16), "o_proj": self.Scaled(16, 16)})]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            inner = layer["fc1"](input=x)
            inner *= 2
            outer = layer["fc2"](inner.relu_())
            outer += x
            x = layer["o_proj"](outer, 0.5)
            x.div_(3)
        return x


@pytest.mark.parametrize("method", moepeft.available())
def test_outputs_changed_in_place_and_unusual_calls(method: str) -> None:
    torch.manual_seed(0)
    model = Careless()
    adapters = moepeft.attach(model, moepeft.method(method, num_tasks=2))
    model.train()(torch.randn(2, 3, 16), task_ids=[0, 1]).square().sum().backward()
    assert all(parameter.grad is not None for name, parameter in adapters.named_parameters() if name.endswith(".A"))


@pytest.mark.parametrize("method", ["ept", "more", "mixlora"])
def test_every_use_of_a_shared_layer_counts_in_the_losses(method: str) -> None:
    """As if every use were a layer of its own: a stack of equal layers has the loss of one that is used as often."""
    config = AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    model = AlbertModel(config).train()
    adapters = moepeft.attach(model, moepeft.method(method, num_tasks=2))
    moved(adapters)
    model(IDS, task_ids=[0, 1])
    (shared,) = adapters.aux_losses().values()
    (terms,) = adapters.runtime.last.losses.values()
    apart = AlbertModel(AlbertConfig(**{**config.to_dict(), "num_hidden_groups": 3})).train()
    others = moepeft.attach(apart, moepeft.method(method, num_tasks=2))
    states = adapters.state_dict(), others.state_dict()
    others.load_state_dict({name: states[0][_first(name)] for name in states[1]})
    bare = {name: value for name, value in model.state_dict().items() if "moepeft" not in name}
    apart.load_state_dict(
        {name: bare[_first(name)] for name in apart.state_dict() if "moepeft" not in name}, strict=False
    )
    apart(IDS, task_ids=[0, 1])
    (expected,) = others.aux_losses().values()
    assert len(terms) == len(next(iter(others.runtime.last.losses.values())))
    assert torch.isclose(shared, expected, rtol=1e-4)
    shared.backward()


def _first(name: str) -> str:
    for number in "12":
        name = name.replace(f"albert_layer_groups.{number}.", "albert_layer_groups.0.")
        name = name.replace(f"albert_layer_groups/{number}/", "albert_layer_groups/0/")
    return name


def test_a_model_that_is_itself_a_layer_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"is itself a layer, a Linear.*wrap the layer, as in nn.Sequential"):
        moepeft.attach(nn.Linear(4, 4), moepeft.method("lora"))
