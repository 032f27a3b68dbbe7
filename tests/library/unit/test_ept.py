"""EPT's arithmetic against torch's and numpy's own products, by its definition and by its fast path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor, nn

import moepeft
from moepeft.errors import ConfigError, Unsupported
from moepeft.fast import fast_paths
from moepeft.methods._fast import ept
from moepeft.methods.ept import EPT, Definition, Pyramid, add_experts, add_pyramid, expert_gates, expert_update
from tests.support.hosts import batch, build, output

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=["plain", "sorted", "definition"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """The ways to compute: both forms of the fast path, and the definition. Whether it is the fast path."""
    monkeypatch.setattr(ept, "WIDE", 0 if request.param == "sorted" else 1 << 30)
    with fast_paths(request.param != "definition"):
        yield request.param != "definition"


def draw_pyramid(
    scales: list[tuple[int, int]], widths: tuple[int, int], rank: int, device: str = "cpu"
) -> tuple[Pyramid, list[Tensor]]:
    """A pyramid of (experts, size) with random numbers in float64, and its parameters."""
    i, o = (width // min(size for _, size in scales) for width in widths)
    shapes = [(rank, i), (o, rank), *((count, size, size) for count, size in scales)]
    A, B, *kernels = leaves = [torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes]
    return Pyramid(A, B, kernels, [1 / (1 + k) for k in range(len(scales))]), leaves


def kronecker_sum(pyramid: Pyramid, gates: Tensor, widths: tuple[int, int]) -> Tensor:
    """Sum over experts of g f Z (x) K as a matrix (out, in), by torch.kron."""
    i, o = widths
    total, expert = torch.zeros(o, i, dtype=torch.float64), 0
    for kernels, factor in zip(pyramid.kernels, pyramid.factors, strict=True):
        for kernel in kernels:
            s = kernel.shape[-1]
            dense = torch.kron(pyramid.B[: o // s] @ pyramid.A[:, : i // s], kernel)
            total = total + gates[expert] * factor * F.pad(dense, (0, i % s, 0, o % s))
            expert += 1
    return total


# ---------------------------------------------------------------------- what an expert is


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 9), w=st.integers(1, 6), h=st.integers(1, 6), rank=st.integers(1, 5), extra=st.integers(0, 8)
)
def test_an_expert_is_a_deconvolution_and_a_kronecker_product(size: int, w: int, h: int, rank: int, extra: int) -> None:
    i, o = w * size + extra % size, h * size + (extra + 1) % size
    pyramid, (A, B, kernel) = draw_pyramid([(1, size)], (i, o), rank)
    x = torch.randn(2, 3, i, dtype=torch.float64)
    dense = F.conv_transpose2d((B @ A)[None, None], kernel[None], stride=size)[0, 0]
    assert np.allclose(dense.detach(), np.kron((B @ A).detach(), kernel[0].detach()), atol=1e-12)
    expected = F.pad(F.linear(x[..., : w * size], dense), (0, o - h * size))
    K = kernel.expand(2, 1, size, size)
    assert torch.allclose(expert_update(x, A, B, K, o), expected, atol=1e-10)
    for enabled in (True, False):
        for gates in (x.new_ones(2, 1), x.new_ones(2, 3, 1)):
            with fast_paths(enabled):
                assert torch.allclose(add_pyramid(x.new_zeros(2, 3, o), x, gates, pyramid), expected, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("widths", [(24, 36), (23, 37)])
@pytest.mark.parametrize("scales", [[(2, 2), (1, 4), (3, 6)], [(1, 3), (2, 4), (1, 5)], [(4, 1)], [(3, 6)]])
def test_a_pyramid_is_a_sum_of_kronecker_products(
    either: bool, scales: list[tuple[int, int]], widths: tuple[int, int], tokens: int, device: str
) -> None:
    """Values and all gradients; per row, and per token with the same gates."""
    pyramid, leaves = draw_pyramid(scales, widths, 2, device)
    experts = sum(count for count, _ in scales)
    shapes = (2, tokens, widths[1]), (2, tokens, widths[0]), (2, experts)
    y, x, gates = (torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes)
    inputs = [y, x, gates, *leaves]
    # As a sum over positions makes it, the gradient of y is one number expanded; `torch.autograd` leaves it so.
    cotangent = torch.randn(2, 1, 1, dtype=torch.float64, device=device).expand(shapes[0])
    on_cpu = Pyramid(pyramid.A.cpu(), pyramid.B.cpu(), [K.cpu() for K in pyramid.kernels], pyramid.factors)
    dense = torch.stack([kronecker_sum(on_cpu, row.cpu(), widths) for row in gates])
    expected = y + torch.einsum("roi,rni->rno", dense.to(device), x)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for given_gates in (gates, gates[:, None].expand(2, tokens, experts)):
        found = add_pyramid(y, x, given_gates, pyramid)
        assert torch.allclose(found, expected, atol=1e-10)
        for a, b in zip(torch.autograd.grad(found, inputs, cotangent), wanted, strict=True):
            assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("widths", [(8, 12), (9, 13)])
def test_gradients_against_finite_differences(either: bool, widths: tuple[int, int], tokens: bool) -> None:
    """The definition differentiates twice. The fast path does once, and says so."""
    pyramid, leaves = draw_pyramid([(2, 2), (1, 4)], widths, 2)
    shapes = (2, 3, widths[1]), (2, 3, widths[0]), (2, 3, 3) if tokens else (2, 3)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def update(y: Tensor, x: Tensor, gates: Tensor, A: Tensor, B: Tensor, *kernels: Tensor) -> Tensor:
        return add_pyramid(y, x, gates, Pyramid(A, B, kernels, pyramid.factors)).square()

    assert torch.autograd.gradcheck(update, [*inputs, *leaves])
    if not either:
        assert torch.autograd.gradgradcheck(update, [*inputs, *leaves])
        return
    (first,) = torch.autograd.grad(update(*inputs, *leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_path_in_narrower_types(dtype: torch.dtype) -> None:
    pyramid, _ = draw_pyramid([(2, 2), (2, 4)], (24, 37), 3)
    narrow = Pyramid(pyramid.A.to(dtype), pyramid.B.to(dtype), [K.to(dtype) for K in pyramid.kernels], pyramid.factors)
    x, gates, y = (torch.randn(shape, dtype=dtype) for shape in ((3, 20, 24), (3, 4), (3, 20, 37)))
    wide = Pyramid(*(part.double() for part in narrow[:2]), [K.double() for K in narrow.kernels], pyramid.factors)
    expected = add_pyramid(y.double(), x.double(), gates.double(), wide)
    found = add_pyramid(y, x, gates, narrow)
    assert found.dtype == dtype
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < 8 * torch.finfo(dtype).eps


def test_the_released_operator_is_a_dense_matrix() -> None:
    """Row c s + j of W_e is K[c, j] times row c of the pruned seed, and nothing is read after the first in // s."""
    model = nn.Sequential(nn.Linear(50, 35, bias=False)).double()
    adapters = moepeft.attach(model, moepeft.method("ept@released", kernels=(4,), top_k=1, dropout=0.0))
    model.double()
    adapter = adapters.adapters["0"]
    (kernels,) = adapter.kernels
    seed = adapter.B[: 35 // 4] @ adapter.A[:, : 50 // 4]
    dense = torch.zeros(35, 50, dtype=torch.float64)
    dense[:32, :12] = torch.cat([torch.outer(kernels[0, c], seed[c]) for c in range(8)])
    assert torch.allclose(adapter.delta_weight(0), 4 * dense, atol=1e-12)  # alpha / r = 32 / 8


# ---------------------------------------------------------------------- a method of one's own


def rectangular_update(
    x: Float[Tensor, "rows *n i"], A: Tensor, B: Tensor, K: Tensor, out_features: int
) -> Float[Tensor, "rows *n o"]:
    """W_e x for W_e = Z_e (x) K with K (t, s)."""
    t, s = K.shape[-2:]
    h, w = out_features // t, x.shape[-1] // s
    blocks = x[..., : w * s].unflatten(-1, (w, s))
    grown = torch.einsum("...ws,rw,...ts,hr->...ht", blocks, A[:, :w], K, B[:h])
    return F.pad(grown.flatten(-2), (0, out_features - h * t))


def add_rectangular(y: Tensor, x: Tensor, gates: Tensor, pyramid: Pyramid, once: Any = None) -> Tensor:
    return add_experts(rectangular_update, y, x, gates, pyramid)


class RectangularEPT(EPT):
    """Kernels that are twice as high as wide: nothing but the definition is new."""

    @property
    def definition(self) -> Definition:
        return Definition(lambda s, out_features: (2 * s, s), add_rectangular)


def test_a_rectangular_kernel_is_a_new_definition_alone(either: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 36)).double()
    factory = RectangularEPT(num_tasks=3, kernels=(2, 2, 4), rank=4, contrastive=0.0)
    adapters = moepeft.attach(model, factory)
    model.double()
    count = adapters.parameter_count()
    assert count.total == count.closed_form
    assert [tuple(kernel.shape) for kernel in adapters.adapters["0"].kernels] == [(2, 4, 2), (1, 8, 4)]
    x, ids = torch.randn(6, 5, 24, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    target = torch.randn(6, 5, 36, dtype=torch.float64)
    optimiser = torch.optim.Adam(adapters.parameters(), lr=1e-2)
    losses = []
    for _ in range(50):
        optimiser.zero_grad()
        loss = (model(x, task_ids=ids) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    expected = model.eval()(x, task_ids=ids)
    adapters.merge(task=1)
    assert torch.allclose(model(x)[[1, 4]], expected[[1, 4]], atol=1e-10)


# ---------------------------------------------------------------------- the adapter


def test_update_per_row_equals_its_merged_weight(either: bool) -> None:
    """Rows of different tasks, a width that no kernel divides, token routing against the same gates by hand."""
    model = nn.Sequential(nn.Linear(50, 35)).double()
    adapters = moepeft.attach(model, EPT(num_tasks=3, kernel_init="uniform"))
    model.double()
    adapter = adapters.adapters["0"]
    adapter.task_embedding.data.normal_()
    x = torch.randn(3, 4, 50, dtype=torch.float64)
    y = model(x, task_ids=torch.tensor([2, 0, 1]))
    for row, task in enumerate((2, 0, 1)):
        weight = model[0].weight + adapter.delta_weight(task)
        assert torch.allclose(y[row], F.linear(x[row], weight, model[0].bias), atol=1e-12)
    gates = adapter.route(adapter.task_embedding)
    assert (gates > 0).sum(-1).eq(2).all()
    assert torch.allclose(gates.sum(-1), torch.ones(3, dtype=torch.float64))


def test_a_model_differentiates_twice_by_definitions() -> None:
    """The gradient of a gradient's norm, as penalties and influence functions take it."""
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)).double()
    adapters = moepeft.attach(model, EPT(num_tasks=2, kernel_init="uniform"))
    model.double()
    x = torch.randn(4, 5, 24, dtype=torch.float64)
    with fast_paths(False):
        loss = model(x, task_ids=torch.tensor([0, 1, 0, 1])).square().mean() + adapters.aux_loss()
        parameters = list(adapters.parameters())
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters)


def test_token_routing_gives_tokens_their_own_experts() -> None:
    model = nn.Sequential(nn.Linear(48, 48))
    adapters = moepeft.attach(model, EPT(routing="token", kernel_init="uniform", contrastive=0.0))
    x = torch.randn(2, 5, 48)
    with adapters.recording() as stats:
        y = model(x)
    assert stats["0"]["gates"].shape == (2, 5, 8)
    assert len({tuple(row.nonzero().flatten().tolist()) for row in stats["0"]["gates"].flatten(0, 1)}) > 1
    assert torch.allclose(y[0, 3], model(x[:1, 3:4])[0, 0], atol=1e-5)


def test_training_follows_a_first_call_in_inference_mode() -> None:
    """What the fast path caches per size must serve both."""
    model = nn.Sequential(nn.Linear(26, 30))
    adapters = moepeft.attach(model, EPT(num_tasks=2, kernels=(2, 4, 6)))
    x, ids = torch.randn(2, 3, 26), torch.tensor([0, 1])
    with torch.inference_mode():
        model(x, task_ids=ids)
    model(x, task_ids=ids).square().mean().backward()
    assert all(kernel.grad is not None for kernel in adapters.adapters["0"].kernels)


# ---------------------------------------------------------------------- readings


@pytest.mark.parametrize(
    ("reading", "factors"),
    [("tasks", [2 / 8, 4 / 8, 6 / 8, 8 / 8]), ("seed", [1, 1 / 2, 1 / 3, 1 / 4]), ("none", [1, 1, 1, 1])],
)
def test_dimension_factors(reading: Any, factors: list[float]) -> None:
    assert EPT(num_tasks=8, dimension_factor=reading, alpha=8.0).factors == pytest.approx(factors)


def test_the_dimension_factor_scales_each_expert() -> None:
    """d_t / T is the default; with one task the largest kernel counts eight times."""
    adapter = moepeft.attach(nn.Sequential(nn.Linear(24, 24)), EPT(num_tasks=1, alpha=8.0)).adapters["0"]
    plain = moepeft.attach(nn.Sequential(nn.Linear(24, 24)), EPT(dimension_factor="none", alpha=8.0)).adapters["0"]
    for kernel in adapter.kernels:
        nn.init.normal_(kernel)
    plain.load_state_dict(adapter.state_dict())
    x, y = torch.randn(1, 3, 24), torch.zeros(1, 3, 24)
    for expert, size in enumerate((2, 2, 4, 4, 6, 6, 8, 8)):
        gates = F.one_hot(torch.tensor([expert]), 8).float()
        assert torch.allclose(adapter.add_update(y, x, gates), size * plain.add_update(y, x, gates), rtol=1e-4)


def test_gates_of_a_softmax_over_all_keep_their_share() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 3.5, -1.0, 0.0]], dtype=torch.float64)
    p = logits.softmax(-1)
    assert expert_gates(logits, 2, "softmax_all").tolist() == [[0, 0, p[0, 2], p[0, 3]], [p[1, 0], p[1, 1], 0, 0]]
    renormalised = p[0, 2:] / p[0, 2:].sum()
    assert torch.allclose(expert_gates(logits, 2, "softmax")[0, 2:], renormalised)
    assert torch.allclose(expert_gates(logits, 2, "double_softmax")[0, 2:], p[0, 2:].softmax(-1))


def test_the_router_trains_with_one_expert_where_gates_are_not_renormalised() -> None:
    for reading, trains in (("softmax", False), ("softmax_all", True)):
        factory = EPT(num_tasks=2, top_k=1, gates=reading, kernel_init="uniform", contrastive=0.0)
        adapters = moepeft.attach(nn.Sequential(nn.Linear(24, 24)), factory)
        adapters.model(torch.randn(2, 3, 24), task_ids=torch.tensor([0, 1])).square().sum().backward()
        gradient = adapters.adapters["0"].gate.weight.grad
        assert (gradient is not None and bool(gradient.any())) == trains
        assert ("gate.weight" in factory.capabilities.never_trained) != trains


@pytest.mark.parametrize("kernels", [(4, 4, 4, 4, 8, 8, 12, 12), (3, 3, 4, 5, 6, 7, 8, 9), (2, 4)])
@pytest.mark.parametrize(("rank", "top_k"), [(4, 1), (16, 2)])
def test_the_released_seed_is_half_whatever_the_kernels(kernels: tuple[int, ...], rank: int, top_k: int) -> None:
    factory = moepeft.method("ept@released", kernels=kernels, rank=rank, top_k=top_k, num_tasks=3)
    adapters = moepeft.attach(nn.Sequential(nn.Linear(50, 35)), factory)
    adapter = adapters.adapters["0"]
    assert adapter.A.shape == (rank, 25)
    assert adapter.B.shape == (17, rank)
    assert [tuple(K.shape[1:]) for K in adapter.kernels] == [(35 // s, s) for s in sorted(set(kernels))]
    count = adapters.parameter_count()
    assert count.total == count.closed_form


def test_a_half_seed_has_no_kernel_of_size_one() -> None:
    with pytest.raises(ConfigError, match="kernels=1, wanted a whole number from 2 on"):
        EPT(kernels=(1, 2), seed_width="half")


def test_the_released_loss_is_the_mean_over_encoder_sites_alone() -> None:
    """0.1 times the mean over sites that stand in the encoder; the decoder's tables get no contrastive gradient."""
    model = build("t5")
    adapters = moepeft.attach(model, moepeft.method("ept@released", num_tasks=4, kernels=(2, 4), dropout=0.0))
    inputs = batch(model)
    output(model.train(), inputs, task_ids=torch.arange(4))
    terms = adapters.runtime.last.losses["contrastive"]
    encoder = [site.name for site in adapters.sites if site.name.startswith("encoder.")]
    assert sorted(terms) == sorted(encoder)
    singles = [adapters.factory.aux_loss("contrastive", [term]) for term in terms.values()]
    assert torch.allclose(adapters.aux_loss(), torch.stack(singles).mean())
    adapters.aux_loss().backward()
    for site, adapter in adapters.adapters.items():
        gradient = adapter.task_embedding.grad
        assert (gradient is not None and bool(gradient.any())) == site.startswith("encoder."), site


def test_readings_are_among_the_ablations() -> None:
    readings = [{**ablation} for ablation in EPT.ablations.values()]
    assert {a["dimension_factor"] for a in readings if "dimension_factor" in a} == {"seed", "none"}
    assert {a["gates"] for a in readings if "gates" in a} == {"softmax_all", "double_softmax"}
    assert (EPT().dimension_factor, EPT().gates) == ("tasks", "softmax")


def test_the_recipe_is_what_the_script_trains_with() -> None:
    released, recipe = moepeft.method("ept@released"), EPT.recipes["glue"]
    assert (released.rank, released.alpha, released.top_k, released.dropout) == (8, 32, 2, 0.1)
    assert released.kernels == (2, 2, 4, 4, 6, 6, 8, 8)
    assert (recipe.learning_rate, recipe.batch_size, recipe.warmup_steps, recipe.weight_decay) == (3e-4, 128, 500, 0.01)
    assert recipe.sources["learning_rate"] == "script/train_ept.sh"


# ---------------------------------------------------------------------- the configuration


def test_count_of_the_paper_site() -> None:
    """6,144 + 240 numbers per 768 x 768 site at rank 8: seed and kernels."""
    model = nn.Sequential(nn.Linear(768, 768, device="meta"))
    adapter = moepeft.attach(model, EPT()).adapters["0"]
    assert adapter.A.numel() + adapter.B.numel() == 6144
    assert sum(kernel.numel() for kernel in adapter.kernels) == 240


def test_the_order_of_kernels_means_nothing() -> None:
    assert EPT(kernels=(8, 2, 4, 2)) == EPT(kernels=(2, 2, 4, 8))


def test_a_site_narrower_than_the_largest_kernel_is_refused() -> None:
    with pytest.raises(Unsupported, match="largest kernel 8 does not fit site '0' of shape 5 -> 9"):
        moepeft.attach(nn.Sequential(nn.Linear(5, 9)), EPT())


def test_without_any_randomness_nothing_would_ever_train() -> None:
    with pytest.raises(ConfigError, match=r"no gradient.*kernel_init='uniform'"):
        EPT(seed_init="zero")
