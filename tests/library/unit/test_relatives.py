"""The relatives against what nobody here wrote, where no golden vector covers it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moepeft
from moepeft.errors import Unsupported
from tests.support.hosts import build


def randomised(model: nn.Module, factory: moepeft.AdapterFactory, seed: int = 0) -> moepeft.Attachment:
    """Adapters away from their start."""
    adapters = moepeft.attach(model, factory)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapters


def linear(i: int = 6, o: int = 5) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(i, o)


# ---------------------------------------------------------------------- LoRA per task


def test_lora_per_task_is_a_lora_of_each_task() -> None:
    """Each row equals a plain LoRA that holds the factors of the row's task, itself held to the peft package."""
    model = nn.Sequential(linear())
    adapters = randomised(model, moepeft.method("lora-per-task", rank=2, num_tasks=3))
    own = adapters.state_dict()
    x, tasks = torch.randn(4, 7, 6), [2, 0, 1, 2]
    together: Tensor = model(x, task_ids=tasks)
    for row, task in enumerate(tasks):
        single = nn.Sequential(linear())
        lora = moepeft.attach(single, moepeft.method("lora", rank=2))
        lora.load_state_dict({f"sites.0.{name}": own[f"sites.0.{name}"][task] for name in "AB"})
        assert torch.allclose(together[row], single(x[row]), atol=1e-6)


# ---------------------------------------------------------------------- MoLA


def test_mola_gives_each_stack_its_experts_by_depth() -> None:
    """T5's two stacks count their layers apart; cross-attention stands in the decoder though it reads the encoder."""
    for host in ("t5", "bert"):
        model = build(host)
        adapters = moepeft.attach(model, moepeft.method("mola", allocation=(3, 5), top_k=1))
        found = {site: adapters.adapters[site.name].experts.router.shape[0] for site in adapters.sites}
        assert {site.layer for site in found} == {0, 1}
        assert all(experts == (3, 5)[site.layer] for site, experts in found.items())


# ---------------------------------------------------------------------- SMoRA


def test_smora_opens_k_ranks_and_a_bias_moves_the_choice_alone() -> None:
    """Token by token: the softmax of the chosen scores is that of the scores without the bias that chose them."""
    model = nn.Sequential(linear())
    adapters = randomised(model, moepeft.method("smora", rank=5, top_k=2, alpha=3.0))
    adapter = adapters.adapters["0"]
    adapter.bias.copy_(torch.tensor([0.0, 4.0, -4.0, 0.5, 0.0]))
    x = torch.randn(9, 6)
    with torch.no_grad():
        rows = model(x)
    for token, row in zip(x, rows, strict=True):
        scores = adapter.router @ token
        biased = (scores + adapter.bias).tolist()
        chosen = sorted(range(5), key=biased.__getitem__)[-2:]
        gates = scores[chosen].softmax(dim=0)
        update = sum(gate * adapter.B[:, j] * (adapter.A[j] @ token) for gate, j in zip(gates, chosen, strict=True))
        assert torch.allclose(row, linear()(token) + 3.0 * update, atol=1e-5)


class Masked(nn.Module):
    """A layer that is told which positions are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


def test_smora_moves_its_bias_towards_idle_ranks() -> None:
    """Three real tokens open rank 0 of four: its count is above the mean, the others' are below."""
    host = Masked().train()
    adapters = moepeft.attach(host, moepeft.method("smora", rank=4, top_k=1, update_rate=0.25))
    bias = adapters.adapters["layer"].bias
    bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    host(torch.randn(2, 3, 6), attention_mask=torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert torch.equal(adapters.runtime.tallies["layer"], torch.tensor([3.0, 0.0, 0.0, 0.0]))
    adapters.after_step()
    assert torch.equal(bias, torch.tensor([8.75, 0.25, 0.25, 0.25]))


# ---------------------------------------------------------------------- FlyLoRA


def test_flylora_opens_the_ranks_of_the_largest_magnitude() -> None:
    """Token by token, as the paper says; the golden vectors are of the fork, which chooses by value."""
    model = nn.Sequential(linear())
    adapters = randomised(model, moepeft.method("flylora", rank=5, top_k=2, alpha=3.0))
    adapter = adapters.adapters["0"]
    adapter.bias.copy_(torch.tensor([0.0, 0.4, -0.4, 0.05, 0.0]))
    x = torch.randn(9, 6)
    with torch.no_grad():
        rows = model(x)
    for token, row in zip(x, rows, strict=True):
        h = adapter.A @ token
        magnitude = (h + adapter.bias).abs().tolist()
        update = sum(h[j] * adapter.B[:, j] for j in sorted(range(5), key=magnitude.__getitem__)[-2:])
        assert torch.allclose(row, linear()(token) + 3.0 / 5 * update, atol=1e-5)


def test_flylora_draws_a_sparse_projection_that_is_saved_and_not_trained() -> None:
    adapters = moepeft.attach(nn.Sequential(linear(40, 3)), moepeft.method("flylora", rank=8, top_k=2))
    A = adapters.adapters["0"].A
    assert ((A != 0).sum(dim=1) == 10).all()
    assert not torch.equal(A[0] != 0, A[1] != 0)
    assert 0.5 / 8 < A[A != 0].std() < 2 / 8
    assert [name for name, _ in adapters.named_parameters()] == ["sites.0.B"]
    assert "sites.0.A" in adapters.state_dict()


@pytest.mark.parametrize(("preset", "reaches"), [("published", True), ("released", False)])
def test_flylora_released_lets_no_gradient_through_its_projection(preset: str, reaches: bool) -> None:
    model = nn.Sequential(linear())
    randomised(model, moepeft.method(f"flylora@{preset}", rank=4, top_k=2))
    x = torch.randn(3, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    bare = torch.ones(3, 5) @ linear().weight
    assert torch.allclose(gradient, bare, atol=1e-6) == (not reaches)


# ---------------------------------------------------------------------- DCFT


@pytest.mark.parametrize(("kernel", "rank"), [(2, 1), (3, 2), (4, 1)])
def test_dcft_is_a_transposed_convolution_where_the_kernel_divides_and_where_not(kernel: int, rank: int) -> None:
    model = nn.Sequential(linear(13, 10))
    adapters = randomised(model, moepeft.method("dcft", kernel=kernel, rank=rank, alpha=2.0))
    adapter = adapters.adapters["0"]
    seed = (adapter.B @ adapter.A)[None, None]
    expanded = nn.functional.conv_transpose2d(seed, adapter.C[None, None], stride=kernel)[0, 0]
    W = torch.zeros(10, 13)
    W[: expanded.shape[0], : expanded.shape[1]] = expanded
    assert torch.allclose(adapter.delta_weight(None), 2.0 * W, atol=1e-6)
    A, B = adapter.lora_factors(None)
    assert A.shape[0] == rank * kernel
    assert torch.allclose(adapter.scale * B @ A, 2.0 * W, atol=1e-6)
    x = torch.randn(3, 4, 13)
    assert torch.allclose(model(x), linear(13, 10)(x) + 2.0 * x @ W.T, atol=1e-5)


def test_dcft_refuses_a_layer_smaller_than_its_kernel() -> None:
    with pytest.raises(Unsupported, match="kernel=6 is larger than a side of '0' \\(5 x 6\\)"):
        moepeft.attach(nn.Sequential(linear()), moepeft.method("dcft", kernel=6))
