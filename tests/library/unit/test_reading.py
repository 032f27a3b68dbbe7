"""What the code of a model says of its layers: the order of calls, weights it computes with, tables of positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartModel,
    BloomConfig,
    BloomModel,
    DebertaConfig,
    DebertaModel,
    JambaConfig,
    JambaModel,
    MobileBertConfig,
    MobileBertModel,
    Swinv2Config,
    Swinv2Model,
    XLMConfig,
    XLMModel,
)

import moepeft
from moepeft.reading import names_in_order, weights_read
from moepeft.sites import find_sites, survey

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class Host(nn.Module):
    """Registered last, called first; one weight multiplied by hand, one only looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.looked_at, self.helper, self.first = (nn.Linear(8, 8) for _ in range(4))
        self.table = nn.Parameter(torch.randn(1, 4, 8))
        self.steps = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.aside(self.first(x)).to(self.looked_at.weight.dtype)
        pos_table = self.steps(self.table)
        return self.looked_at(F.linear(x, self.taken.weight, self.taken.bias)) + pos_table

    def aside(self, x: Tensor) -> Tensor:
        return self.helper(x)


class Untold(nn.Module):
    """A layer that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) if x.dim() > 0 else self.idle(x)


def test_calls_are_followed_into_methods_and_weights_told_from_questions_about_them() -> None:
    sites = {site.name: site for site in find_sites(Host())}
    assert list(sites)[:2] == ["first", "helper"]
    assert "taken" not in sites
    assert "looked_at" in sites
    assert [layer.name for layer in survey(Host())[1]] == ["taken"]
    assert not sites["looked_at"].of_positions


def called(model: nn.Module, **inputs: Any) -> list[str]:
    names: list[str] = []
    sites = {site.name for site in find_sites(model)}
    for name in sites:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: names.append(name))
    with torch.no_grad():
        model.eval()(**inputs)
    return list(dict.fromkeys(names))


IDS = torch.arange(6, 22).reshape(2, 8)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (lambda: XLMModel(XLMConfig(n_words=64, emb_dim=32, n_layers=2, n_heads=4)), {"input_ids": IDS}),
        (
            lambda: MobileBertModel(
                MobileBertConfig(**SIZES, embedding_size=32, true_hidden_size=32, intra_bottleneck_size=32)
            ),
            {"input_ids": IDS},
        ),
        (
            lambda: BartModel(
                BartConfig(
                    vocab_size=64,
                    d_model=32,
                    encoder_layers=1,
                    decoder_layers=1,
                    encoder_attention_heads=4,
                    decoder_attention_heads=4,
                    encoder_ffn_dim=64,
                    decoder_ffn_dim=64,
                )
            ),
            {"input_ids": IDS, "decoder_input_ids": IDS},
        ),
    ],
    ids=["xlm", "mobilebert", "bart"],
)
def test_the_first_site_is_the_first_to_run(model: Any, inputs: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    host = model()
    assert called(host, **inputs)[0] == find_sites(host)[0].name


def test_every_module_is_named_once_per_place() -> None:
    host = nn.TransformerEncoderLayer(8, 2, 16)
    assert sorted(names_in_order(host)) == sorted(name for name, _ in host.named_modules())
    assert {"linear1", "linear2"} <= weights_read(host)


def test_a_weight_that_one_branch_multiplies_by_hand_is_left_out() -> None:
    """Jamba calls its layer only when quantised; DeBERTa splits its own only when queries are given apart."""
    jamba = JambaModel(
        JambaConfig(
            **SIZES,
            num_key_value_heads=2,
            num_experts=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
            mamba_d_state=4,
            mamba_dt_rank=8,
        )
    )
    assert not any(site.name.endswith("dt_proj") for site in find_sites(jamba))
    deberta = DebertaModel(DebertaConfig(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"]))
    assert sum(site.role == "qkv" for site in find_sites(deberta)) == 2


@pytest.mark.parametrize(("shards", "sites"), [(1, 8), (2, 4)])
def test_conditions_are_read_as_the_model_is_configured(shards: int, sites: int) -> None:
    """BLOOM multiplies slices of its weights itself only to reproduce how it was trained."""
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, pretraining_tp=shards, slow_but_exact=True)
    assert len(find_sites(BloomModel(config))) == sites


@pytest.mark.parametrize("method", ["moelora", "mola", "tucka"])
def test_tables_of_positions_stay_frozen_where_rows_are_routed(method: str) -> None:
    config = Swinv2Config(
        embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=2, image_size=16, patch_size=2, num_channels=1
    )
    host = Swinv2Model(config)
    plain = {site.name for site in find_sites(host) if site.of_positions}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in plain} == {"continuous_position_bias_mlp"}
    adapters = moepeft.attach(host, moepeft.method(method, num_tasks=2))
    assert not plain & {site.name for site in adapters.sites}
    assert plain <= {layer.name for layer in adapters.state.left_out}


def test_layers_that_no_training_forward_reaches_are_named_once() -> None:
    model = Untold()
    moepeft.attach(model, moepeft.method("lora"))
    model.eval()(torch.randn(2, 8))
    with pytest.warns(UserWarning, match=r"1 of 2 adapted layers.*'idle'.*exclude=\['idle'\]"):
        model.train()(torch.randn(2, 8))
    model(torch.randn(2, 8))  # once is enough: warnings are errors here
