"""Each method's arithmetic against something nobody here wrote: torch's convolutions, tensorly, the peft package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moepeft
from benchmarks.methods.parse import parse_methods
from moepeft import method
from moepeft.config import ablations
from moepeft.errors import ConfigError, UnknownMethod, Unsupported
from moepeft.methods.mixlora import MixLoRA, choose, feed_forward
from moepeft.methods.more import MoRE
from moepeft.methods.tucka import TuckA, dense_update
from moepeft.ops.linear import add_linear, add_product, row_mean, token_shares
from moepeft.registry import METHODS, factory_class
from tests.support.hosts import batch, build, output


@pytest.mark.parametrize("masked", [False, True])
def test_row_mean_differentiates(masked: bool) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool() if masked else None
    assert torch.autograd.gradcheck(lambda x: row_mean(x, token_shares(x, mask)), x)
    means = [x[0].mean(0), x[1, 0], torch.zeros(5)] if masked else list(x.mean(1))
    assert torch.allclose(row_mean(x, token_shares(x, mask)), torch.stack(means), atol=1e-14)


@pytest.mark.parametrize("tokens", [3, 1 << 12])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [5, 20])
def test_large_and_small_outputs_are_added_to_alike(tokens: int, kind: torch.dtype, rank: int) -> None:
    y, x = torch.randn(2, tokens, 24, dtype=kind), torch.randn(2, tokens, rank, dtype=torch.float64)
    weight = torch.randn(24, rank, dtype=torch.float64)
    for inputs in (y, y.transpose(0, 1).contiguous().transpose(0, 1), y.expand(2, tokens, 24)):
        leaves = [leaf.clone().requires_grad_() for leaf in (inputs, x, weight)]
        for added in (add_linear(*leaves), add_product(leaves[0], leaves[1], leaves[2].T)):
            torch.testing.assert_close(added, (inputs + x @ weight.T).to(kind))
            grads = torch.autograd.grad(added.sum(), leaves)
            torch.testing.assert_close(grads[0], torch.ones_like(y))
            torch.testing.assert_close(grads[1], weight.sum(dim=0).expand(2, tokens, rank))
            torch.testing.assert_close(grads[2], x.sum(dim=(0, 1)).expand(24, rank))


def _tucka(**fields: Any) -> tuple[nn.Sequential, moepeft.Attachment]:
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 7)).double()
    adapters = moepeft.attach(model, TuckA(rank=4, groups=3, experts=3, **fields))
    model.double()
    generator = torch.Generator().manual_seed(3)
    for parameter in adapters.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model, adapters


def test_tucka_fast_path_is_the_tucker_product() -> None:
    model, adapters = _tucka(alpha=3.0)
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    with adapters.recording() as stats:
        y = model(x)
    hidden = x
    for index in (0, 2):
        adapter, seen = adapters.adapters[str(index)], stats[str(index)]
        T = dense_update(adapter.core[seen["group"][0]], adapter.factor, adapter.mixing, seen["scores"][0])
        hidden = F.linear(hidden + 3.0 * hidden @ T, model[index].weight, model[index].bias)
        hidden = hidden.tanh() if index == 0 else hidden
    assert torch.allclose(y, hidden, atol=1e-12)


def test_tucka_definition_keeps_gradients() -> None:
    """tensorly's own algebra on torch tensors: gradients reach all four factors."""
    factors = [torch.randn(shape, requires_grad=True) for shape in ((2, 4, 4), (6, 4), (3, 2), (3,))]
    dense_update(*factors).square().sum().backward()
    assert all(factor.grad is not None and factor.grad.abs().sum() > 0 for factor in factors)


def test_tucka_routing_by_row_equals_rows_alone() -> None:
    model, _ = _tucka(routing="row")
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    together = model(x)
    assert torch.allclose(together, torch.cat([model(x[row : row + 1]) for row in range(4)]), atol=1e-12)


def test_tucka_group_choice() -> None:
    """Raw affinities (3,3,3), (.001,0,0), (2,2,2): the release picks the most uneven group, the paper the nearest."""
    affinities = torch.tensor([3.0, 3, 3, 0.001, 0, 0, 2, 2, 2])
    for choice, winner in (("affinity", 0), ("normalised", 1)):
        model, adapters = _tucka(choice=choice, centroids="kaiming")
        model.float()
        adapters.shared.centroids.data = torch.diag(affinities) @ torch.ones(9, 12) / 12
        group, weights, _ = adapters.shared(torch.ones(1, 12))
        assert group.item() == winner
        assert ((weights > 0.26) & (weights < 0.74)).all()


def test_tucka_centroids_start_near_the_first_batch_once() -> None:
    model = nn.Sequential(nn.Linear(12, 12))
    adapters = moepeft.attach(model, TuckA(perturbation=0.5))
    x = torch.randn(4, 5, 12)
    model(x)
    mean = x.mean(dim=(0, 1))
    assert torch.allclose(adapters.shared.centroids[0], mean)
    distance = (adapters.shared.centroids[1:] - mean).abs()
    assert 0 < distance.max() <= 0.5
    before = adapters.shared.centroids.clone()
    model(torch.randn(4, 5, 12))
    assert torch.equal(adapters.shared.centroids, before)


class GatedFFN(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


@settings(max_examples=20, deadline=None)
@given(experts=st.integers(1, 6), rank=st.integers(1, 5), rows=st.integers(1, 3), data=st.data())
def test_mixlora_in_a_host_is_its_definition(experts: int, rank: int, rows: int, data: st.DataObject) -> None:
    """Streams through the host's own code, by fast paths, against `feed_forward` over the host's pieces."""
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(experts)
    ffn = GatedFFN(6, 10).double()
    adapters = moepeft.attach(ffn, MixLoRA(num_experts=experts, rank=rank, top_k=top_k))
    ffn.double()
    for parameter in adapters.parameters():
        parameter.data.normal_()
    x = torch.randn(rows, 3, 6, dtype=torch.float64, requires_grad=True)
    pieces = [
        (lambda z, layer=layer: F.linear(z, layer.weight, layer.bias), adapters.adapters[name].pairs)
        for name, layer in ffn.named_children()
    ]
    choice = choose(F.linear(x, adapters.shared["/"]).softmax(dim=-1), top_k)
    with moepeft.fast_paths(False):
        defined = feed_forward(x, choice, pieces[:2], lambda gate, up: F.silu(gate) * up, pieces[2])
    fast = ffn(x)
    assert torch.allclose(fast, defined, atol=1e-10)
    cotangent = torch.randn_like(fast)
    wanted = [x, *adapters.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * cotangent).sum(), wanted) for y in (fast, defined)), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("host", ["bert", "roberta", "deberta", "t5", "gated_t5", "llama", "gpt2"])
def test_mixlora_finds_and_trains_every_ffn(host: str) -> None:
    model = build(host)
    adapters = moepeft.attach(model, MixLoRA())
    inputs = batch(model, padded=2)
    with adapters.disabled(), torch.no_grad():
        bare = output(model, inputs)
    assert torch.allclose(output(model, inputs), bare, atol=1e-5)
    for parameter in adapters.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.train()
    (output(model, inputs).square().mean() + adapters.aux_loss()).backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.parameters())
    assert not any(isinstance(value, tuple) for value in adapters.runtime.last.values.values())  # no activation is kept


def test_mixlora_balance_is_k_at_perfect_balance_and_larger_off_it() -> None:
    from moepeft.ops.losses import balance_loss

    even = torch.stack((torch.full((8,), 2.0), torch.full((8,), 1.0), torch.full((8,), 8.0)))
    assert balance_loss(even) == pytest.approx(2.0)
    skewed = torch.stack((torch.tensor([8.0, 8] + [0] * 6), torch.tensor([4.0, 4] + [0] * 6), torch.full((8,), 8.0)))
    assert balance_loss(skewed) == pytest.approx(8.0)


def test_mixlora_wants_whole_networks() -> None:
    with pytest.raises(Unsupported, match=r"only \['up'\]"):
        moepeft.attach(build("bert"), MixLoRA(), sites=["q", "up"])
    with pytest.raises(Unsupported, match="feed-forward"):
        moepeft.attach(build("bert"), MixLoRA(), sites=["q"])
    adapters = moepeft.attach(build("bert"), MixLoRA(attention=False))
    assert {site.role for site in adapters.sites} == {"up", "down"}


def test_more_selector_trains_and_ranks_change() -> None:
    """The published selector gets gradients and moves; the released map never does."""
    ranks = {}
    for spec in ("more", "more@released"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16))
        adapters = moepeft.attach(model, moepeft.method(spec, num_tasks=4))
        adapter = adapters.adapters["0"]
        ids = torch.arange(4).repeat(8)
        x, target = torch.randn(32, 3, 16), torch.randn(32, 3, 16)
        model(x, task_ids=ids)
        before = adapter.ranks().clone()
        optimiser = torch.optim.Adam(adapters.parameters(), lr=0.03)
        for _ in range(200):
            optimiser.zero_grad()
            loss = (model(x, task_ids=ids) - target).square().mean() + adapters.aux_loss()
            loss.backward()
            optimiser.step()
        seen = adapter.gate.weight.grad is not None and bool(adapter.gate.weight.grad.any())
        ranks[spec] = (before.tolist(), adapter.ranks().tolist(), seen)
    assert ranks["more"][2]
    assert ranks["more"][0] != ranks["more"][1]
    assert not ranks["more@released"][2]
    assert ranks["more@released"][0] == ranks["more@released"][1]


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        ("none", [1, 1, 1, 0]),
        ("rank", [0.75] * 3 + [0]),
        ("tasks", [1.5] * 3 + [0]),
        ("eighths", [1 / 64, 4 / 64, 9 / 64, 0]),
    ],
)
def test_more_scaling(scaling: Any, factor: list[float]) -> None:
    config = MoRE(rank=4, num_tasks=2, scaling=scaling)
    adapter = moepeft.attach(nn.Sequential(nn.Linear(6, 6)), config).adapters["0"]
    adapter.gate.bias.data = torch.tensor([0.0, 0, 9, 0])
    assert adapter.term_weights()[0].tolist() == pytest.approx(factor)


def test_moelora_gate_is_shared_and_rows_may_have_several_tasks() -> None:
    model = build("bert").double()
    adapters = moepeft.attach(model, moepeft.method("moelora", num_tasks=3, rank=4, num_experts=2))
    model.double()
    gates = {id(adapter.gate) for adapter in adapters.adapters.values()}
    assert len(gates) == 1
    for adapter in adapters.adapters.values():
        adapter.B.data.normal_()
    inputs = batch(model)
    single = output(model, inputs, task_ids=torch.tensor([0, 1, 2, 0]))
    padded = output(model, inputs, task_ids=torch.tensor([[[0, -1]], [[1, -1]], [[2, -1]], [[0, -1]]]))
    assert torch.allclose(single, padded)
    mixed = output(model, inputs, task_ids=torch.tensor([[[0, 1]], [[1, -1]], [[2, -1]], [[0, -1]]]))
    assert not torch.allclose(single[0], mixed[0])
    assert torch.allclose(single[1:], mixed[1:])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("lora", {"rank": 0}, r"rank=0, wanted a whole number from 1 on"),
        ("lora", {"alpha": -1.0}, r"alpha=-1.0, wanted a finite number above 0"),
        ("lora", {"dropout": 1.0}, r"dropout=1.0, wanted a probability"),
        ("lora", {"ranks": 4}, r"no hyper-parameter 'ranks'. Did you mean rank\?"),
        ("moelora", {"rank": 12}, r"rank=12 is not a multiple of num_experts=8.*is 16"),
        ("more", {"selector": "off"}, r"selector='off', wanted one of 'trained', 'frozen'"),
        ("mixlora", {"top_k": 9}, r"top_k=9, wanted a whole number from 1 to 8"),
        ("mixlora", {"targets": ()}, r"targets is empty"),
        ("mixlora", {"targets": ("q",)}, r"targets='q', wanted one of 'gate'"),
        ("tucka", {"groups": 0}, r"groups=0"),
        ("ept", {"top_k": 9}, r"top_k=9, wanted a whole number from 1 to 8. there are as many experts as kernels"),
        ("ept", {"kernels": ()}, r"kernels is empty"),
        ("ept", {"kernels": (2, 0)}, r"kernels=0"),
        ("ept", {"temperature": 0}, r"temperature=0, wanted a finite number above 0"),
    ],
)
def test_configs_refuse_with_value_range_and_way_out(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        moepeft.method(name, **fields)


@pytest.mark.parametrize("name", ["moelora", "more", "ept", "tucka"])
def test_deberta_position_table_belongs_to_no_row(name: str) -> None:
    """DeBERTa sends its relative positions through the query and key projections: rows still stand alone."""
    model = build("deberta")
    options = {"routing": "row"} if name == "tucka" else {}
    adapters = moepeft.attach(model, moepeft.method(name, num_tasks=4, **options))
    inputs, ids = batch(model, padded=2), torch.arange(4)
    model(**inputs, task_ids=ids)
    for parameter in adapters.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    together = output(model, inputs, task_ids=ids)
    alone = [output(model, {k: v[[row]] for k, v in inputs.items()}, task_ids=ids[[row]]) for row in range(4)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    with pytest.raises(moepeft.errors.NotMergeable):
        adapters.merge(task=1)
    adapters.detach()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_unknown_methods_and_presets_suggest() -> None:
    with pytest.raises(moepeft.errors.UnknownMethod, match="Did you mean tucka"):
        moepeft.method("tuca")
    with pytest.raises(moepeft.errors.UnknownMethod, match="Did you mean released"):
        moepeft.method("ept@relaesed")


@pytest.mark.parametrize("spec", [f"{name}@{one}" for name in METHODS for one in ablations(factory_class(name))])
def test_ablations_train_as_they_declare_and_differ_from_the_method(spec: str) -> None:
    factory, whole = method(spec, num_tasks=16), method(spec.partition("@")[0], num_tasks=16)
    assert factory != whole
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    adapters = moepeft.attach(model, factory).model
    handle = moepeft.attachment(adapters)
    count = handle.parameter_count()
    assert count.total == count.closed_form
    optimiser = torch.optim.Adam(handle.parameters(), lr=1e-2)
    before = {name: value.detach().clone() for name, value in handle.named_parameters()}
    for _ in range(3):
        optimiser.zero_grad()
        output = model(torch.randn(16, 5, 32), task_ids=torch.arange(16))
        (output.square().mean() + handle.aux_loss()).backward()
        optimiser.step()
        handle.after_step()
    still = {name for name, value in handle.named_parameters() if torch.equal(value, before[name])}
    assert all(name.endswith(factory.capabilities.never_trained) for name in still), still


def test_ablations_are_chosen_on_the_command_line_together() -> None:
    names = tuple(parse_methods(("tucka@ablations",), num_tasks=2))
    assert names[:3] == ("majority", "head", "tucka")
    assert set(names[3:]) == {f"tucka@{one}" for one in ablations(factory_class("tucka"))}
    with pytest.raises(UnknownMethod, match="declares no ablations"):
        parse_methods(("lora@ablations",), num_tasks=2)


def test_an_empty_batch_starts_no_centroids_of_tucka() -> None:
    model = nn.Sequential(nn.Linear(5, 5))
    adapters = moepeft.attach(model, moepeft.TuckA(groups=2, rank=2))
    before = dict(adapters.named_parameters())["shared.centroids"].clone()
    model(torch.zeros(0, 3, 5))
    assert torch.equal(dict(adapters.named_parameters())["shared.centroids"], before)
    model(torch.full((2, 3, 5), 7.0))
    assert torch.allclose(dict(adapters.named_parameters())["shared.centroids"][0], torch.tensor(7.0))
