"""Sites are found by what a layer is; patterns that match nothing say what there is."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import moepeft
from moepeft.errors import NoMatchingSite
from moepeft.sites import find_sites, select_sites
from tests.support.hosts import WIDTH, batch, build, output

ROLES = {
    "bert": {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2},
    "roberta": {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2},
    "deberta": {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2},
    "t5": {"q": 6, "k": 6, "v": 6, "o": 6, "up": 4, "down": 4},
    "gated_t5": {"q": 6, "k": 6, "v": 6, "o": 6, "gate": 4, "up": 4, "down": 4},
    "llama": {"q": 2, "k": 2, "v": 2, "o": 2, "gate": 2, "up": 2, "down": 2},
    "gpt2": {"qkv": 2, "o": 2, "up": 2, "down": 2},
}


@pytest.mark.parametrize("host", ROLES)
def test_roles_and_blocks(host: str) -> None:
    sites = select_sites(find_sites(build(host)), None)
    assert Counter(site.role for site in sites) == ROLES[host]
    ffn = [site for site in sites if site.role in ("gate", "up", "down")]
    members = Counter(site.block for site in ffn)
    assert None not in members
    assert set(members.values()) == {3 if "gate" in ROLES[host] else 2}
    assert all(site.block is None for site in sites if site not in ffn)
    for site in ffn:
        narrow, wide = (site.in_features, site.out_features)[:: -1 if site.role == "down" else 1]
        assert (narrow, wide) == (WIDTH, 2 * WIDTH)


def test_default_leaves_heads_and_poolers_out() -> None:
    names = {site.name for site in select_sites(find_sites(build("llama")), None)}
    assert "lm_head" not in names
    assert {site.name for site in find_sites(build("llama"))} == names | {"lm_head"}


def test_cross_attention_reads_the_encoder() -> None:
    streams = {site.name: site.stream for site in find_sites(build("t5"))}
    prefix = "decoder.block.0.layer."
    assert streams[f"{prefix}1.EncDecAttention.k"] == streams[f"{prefix}1.EncDecAttention.v"] == "encoder"
    assert streams[f"{prefix}1.EncDecAttention.q"] == streams[f"{prefix}0.SelfAttention.k"] == "decoder"
    assert streams["encoder.block.0.layer.0.SelfAttention.k"] == "encoder"


@pytest.mark.parametrize("host", ["t5", "llama", "bert"])
def test_a_site_stands_where_its_name_says(host: str) -> None:
    """Cross-attention stands in the decoder whatever it reads; a model of one stack has no decoder to stand in."""
    for site in find_sites(build(host)):
        assert site.stack == ("decoder" if site.name.startswith("decoder.") else "encoder")


class Widening(nn.Module):
    """A block whose names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 24), "b": nn.Linear(24, 8)}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["b"](layer["a"](x).relu())
        return x


def test_shape_tells_what_names_do_not() -> None:
    sites = find_sites(Widening())
    assert [site.role for site in sites] == ["up", "down"] * 2
    assert [site.block for site in sites] == ["layers.0"] * 2 + ["layers.1"] * 2


@pytest.mark.parametrize(
    ("pattern", "number"),
    [
        (["q", "v"], 4),
        (["attention.self.query"], 2),
        (r".*\.layer\.1\..*", 6),
        (lambda site: site.layer == 0 and site.role == "o", 1),
    ],
)
def test_patterns(pattern: moepeft.sites.SitePattern, number: int) -> None:
    assert len(select_sites(find_sites(build("bert")), pattern)) == number


@pytest.mark.parametrize("pattern", [["q", "gate"], "query", lambda site: False])
def test_pattern_without_match_lists_what_there_is(pattern: moepeft.sites.SitePattern) -> None:
    model = build("bert")
    with pytest.raises(NoMatchingSite, match=r"query \(2\).*their roles are: down, k, o, q, up, v"):
        moepeft.attach(model, moepeft.method("lora"), sites=pattern)
    assert not hasattr(model, "moepeft_entry")


def test_layers_that_bypass_their_forward_are_no_sites() -> None:
    model = nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(8, 2, 16), "head": nn.Linear(8, 2)})
    assert [site.name for site in find_sites(model)] == ["head"]


def test_vision_transformer() -> None:
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    model = ViTModel(config, add_pooling_layer=False)
    adapters = moepeft.attach(model, moepeft.method("tucka"))
    assert Counter(site.role for site in adapters.sites) == {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2}
    model(pixel_values=torch.randn(2, 3, 16, 16)).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in adapters.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", moepeft.available())
def test_a_vision_transformer_learns_random_images_by_heart(method: str) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    config.num_labels = 4
    model = ViTForImageClassification(config)
    adapters = moepeft.attach(model, moepeft.method(method, num_tasks=2), train=["classifier"])
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 4
    optimiser = torch.optim.Adam(adapters.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(pixel_values=images, labels=labels, task_ids=torch.arange(16) % 2).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        (loss + adapters.aux_loss()).backward()
        optimiser.step()
        adapters.after_step()
    assert min(losses) < losses[0] / 4  # at this rate the loss of some methods jumps between steps


def test_plain_modules_need_no_transformers() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    adapters = moepeft.attach(model, moepeft.method("ept", num_tasks=3, kernels=(2, 4)))
    y = model(torch.randn(5, 8), task_ids=torch.tensor([0, 1, 2, 0, 1]))
    assert y.shape == (5, 4)
    assert [site.name for site in adapters.sites] == ["0", "2"]
    adapters.detach()
    with pytest.raises(TypeError):
        model(torch.randn(5, 8), task_ids=torch.tensor([0]))


@pytest.mark.parametrize("method", ["mola", "adamole", "smora"])
def test_debertas_position_table_counts_as_no_token(method: str) -> None:
    """The table goes through the projections of query and key after the rows: what they recorded of the rows stays."""
    recorded = []
    for sites in (None, ["v"]):  # values are projected from rows alone
        model = build("deberta").train()
        torch.manual_seed(0)
        adapters = moepeft.attach(model, moepeft.method(method), sites)
        output(model, batch(model, padded=2))
        runtime = adapters.runtime
        counts = {**runtime.last.losses.get("balance", {}), **runtime.tallies}
        recorded.append({name: value for name, value in counts.items() if name.endswith(("query_proj", "value_proj"))})
    rows, values = recorded
    assert {name.rpartition(".")[2] for name in rows} == {"query_proj", "value_proj"}
    rows_counted = {number_of_tokens(counts) for counts in rows.values()}
    assert rows_counted == {number_of_tokens(counts) for counts in values.values()}


def number_of_tokens(counts: torch.Tensor) -> float:
    """Of a balance loss, whose last row counts tokens, or of a tally of tokens' choices."""
    return float((counts[-1, 0] if counts.dim() == 2 else counts.sum()).detach())
