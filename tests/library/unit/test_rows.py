"""Which row has which task, which positions are padding, and when a forward begins: on hosts that make it hard."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import moepeft
from moepeft.errors import GradientsLost, MissingRouting, NotMergeable
from tests.support.hosts import batch, build, output

WIDTH, ROWS, POSITIONS = 8, 3, 5
IDS = [0, 1, 2]


class Host(nn.Module):
    """Two layers in blocks; `shape` says in which form they get (rows, positions, features)."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.before, self.after = before, after

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return self.after(x)


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "rows first": (lambda x: x, lambda y: y),
    "positions first": (lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),
    "positions first, copied": (lambda x: x.transpose(0, 1).contiguous(), lambda y: y.transpose(0, 1)),
    "tokens in one dimension": (lambda x: x.flatten(0, 1), lambda y: y.unflatten(0, (-1, POSITIONS))),
}
GUESSED = {
    "doubled": (lambda x: torch.cat([x, x]), lambda y: y[: len(y) // 2]),
    "some tokens": (lambda x: x.flatten(0, 1)[: 2 * ROWS], lambda y: y),
}


def adapted(model: nn.Module, spec: str = "moelora", **fields: Any) -> moepeft.Attachment:
    torch.manual_seed(1)
    adapters = moepeft.attach(model.eval(), moepeft.method(spec, num_tasks=3, **fields))
    for parameter in adapters.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return adapters


# As many positions as rows say nothing of their order; tokens in one dimension have one length.
ONE_LENGTH = ("positions first", "positions first, copied", "tokens in one dimension")


@pytest.mark.parametrize(
    ("form", "positions"),
    [
        (form, positions)
        for form in FORMS
        for positions in (POSITIONS, ROWS)
        if positions != ROWS or form not in ONE_LENGTH
    ],
)
@pytest.mark.parametrize("spec", ["moelora", "more", "mtl-lora"])
def test_a_row_of_a_mixed_batch_computes_what_it_computes_alone(form: str, spec: str, positions: int) -> None:
    adapters = adapted(Host(*FORMS[form]), spec)
    x = torch.randn(ROWS, positions, WIDTH)
    mixed = adapters.model(x, task_ids=IDS)
    for row, task in enumerate(IDS):
        alone = adapters.model(x[[row]], task_ids=task)
        torch.testing.assert_close(mixed[[row]], alone, rtol=0, atol=1e-5)


def rows_alone(adapters: moepeft.Attachment, x: Tensor) -> Tensor:
    return torch.cat([adapters.model(x[[row]].contiguous(), task_ids=task) for row, task in enumerate(IDS)])


def test_as_many_positions_as_rows_are_refused_until_another_length_has_shown_the_order() -> None:
    adapters = adapted(Host(*FORMS["positions first"]))
    square, other = torch.randn(ROWS, ROWS, WIDTH), torch.randn(ROWS, POSITIONS, WIDTH)
    with pytest.raises(MissingRouting, match="nothing tells which come first"):
        adapters.model(square, task_ids=IDS)
    adapters.model(square, task_ids=1)
    adapters.model(other, task_ids=IDS)
    mixed = adapters.model(square, task_ids=IDS)
    torch.testing.assert_close(mixed, rows_alone(adapters, square), rtol=0, atol=1e-5)


def test_steps_in_memory_say_nothing_of_the_order() -> None:
    """A view of memory in another order was taken for positions first, and so was every batch after it."""
    adapters = adapted(Host(*FORMS["rows first"]))
    x = torch.randn(ROWS, ROWS, WIDTH)
    view = x.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(MissingRouting, match="nothing tells which come first"):
        adapters.model(view, task_ids=IDS)
    torch.testing.assert_close(adapters.model(x, task_ids=IDS), rows_alone(adapters, x), rtol=0, atol=1e-5)


def test_a_table_that_is_expanded_over_the_rows_has_the_rows_first() -> None:
    adapters = adapted(Host(*FORMS["rows first"]))
    table = torch.randn(1, ROWS, WIDTH).expand(ROWS, -1, -1)
    torch.testing.assert_close(adapters.model(table, task_ids=IDS), rows_alone(adapters, table), rtol=0, atol=1e-5)


class Windows(nn.Module):
    """A block whose layer gets each row cut into windows, as Swin's and PatchTST's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Window(size)])

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.blocks[0](x)
        return output


class Window(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size, self.inner = size, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, self.size, WIDTH)).reshape(x.shape)


def test_windows_of_as_many_positions_as_rows_are_refused() -> None:
    """They were taken for positions, and every row got another one's task."""
    x = torch.randn(ROWS, 2 * ROWS, WIDTH)
    adapters = adapted(Windows(2))
    torch.testing.assert_close(adapters.model(x, task_ids=IDS), rows_alone(adapters, x), rtol=0, atol=1e-5)
    with pytest.raises(MissingRouting, match="inner"):
        adapted(Windows(ROWS)).model(x, task_ids=IDS)


@pytest.mark.parametrize("form", GUESSED)
def test_rows_in_an_unknown_order_are_refused_unless_all_are_of_one_task(form: str) -> None:
    adapters = adapted(Host(*GUESSED[form]))
    x = torch.randn(ROWS, POSITIONS, WIDTH)
    with pytest.raises(MissingRouting, match=r"blocks\.0\.0"):
        adapters.model(x, task_ids=IDS)
    adapters.model(x, task_ids=1)


@pytest.mark.parametrize(
    "wrong", [[0.0, 1.0, 2.0], ["a", "b", "c"], [], [0, 1], [True, False, True], [0, 1, 3], [-1, 0, 1]]
)
def test_ids_that_are_none_are_refused(wrong: list[Any]) -> None:
    adapters = adapted(Host(*FORMS["rows first"]))
    with pytest.raises(MissingRouting):
        adapters.model(torch.randn(ROWS, POSITIONS, WIDTH), task_ids=wrong)


def aux_loss(adapters: moepeft.Attachment, x: Tensor, mask: Tensor) -> float:
    adapters.model.train()
    adapters.model(x, attention_mask=mask, task_ids=IDS)
    return float(adapters.aux_loss().detach())


@pytest.mark.parametrize("form", ["rows first", "positions first", "tokens in one dimension"])
@pytest.mark.parametrize("dimensions", [2, 4])
def test_padding_is_not_counted_in_whatever_form_mask_and_input_are(form: str, dimensions: int) -> None:
    x, real = torch.randn(ROWS, POSITIONS, WIDTH), torch.tensor([5, 3, 1])
    mask = torch.arange(POSITIONS) < real.unsqueeze(1)
    noisy = torch.where(mask.unsqueeze(-1), x, torch.full_like(x, 9.0))
    if dimensions == 4:  # what a key adds to the logits of every query
        mask = torch.where(mask[:, None, None, :].expand(-1, -1, POSITIONS, -1), 0.0, -1e9)
    losses = [aux_loss(adapted(Host(*FORMS[form]), "more"), each, mask) for each in (x, noisy)]
    first = aux_loss(adapted(Host(*FORMS["rows first"]), "more"), x, torch.arange(POSITIONS) < real.unsqueeze(1))
    # The second block reads what the first made of the padding, which it leaves where it is.
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] == pytest.approx(first, abs=1e-6)


def test_a_mask_of_other_positions_is_refused_and_one_without_padding_is_not() -> None:
    adapters = adapted(Host(lambda x: x[:, 1:], lambda y: y), "more")
    x = torch.randn(ROWS, POSITIONS, WIDTH)
    aux_loss(adapters, x, torch.ones(ROWS, POSITIONS).long())
    with pytest.raises(MissingRouting, match="padding mask"):
        aux_loss(adapters, x, torch.ones(ROWS, POSITIONS).tril().long())
    with adapters.route(mask=torch.ones(ROWS, POSITIONS - 1).tril()):
        aux_loss(adapters, x, torch.ones(ROWS, POSITIONS).tril().long())


def test_whatever_begins_a_forward_is_routed_and_no_earlier_call_leaves_its_ids() -> None:
    model = build("llama")
    adapters = adapted(model)
    inputs = batch(model, rows=3)
    wanted = {task: model.model(**inputs, task_ids=task).last_hidden_state for task in (0, 1)}
    assert not torch.equal(wanted[0], wanted[1])
    for call in (model.model, model.model.forward):
        with adapters.route(task_ids=1):
            model(**inputs, task_ids=0)
            assert torch.equal(call(**inputs).last_hidden_state, wanted[1])
        with pytest.raises(MissingRouting):
            call(**inputs)
    with adapters.route(task_ids=1):
        assert torch.equal(model.forward(**inputs).logits, output(model, inputs))


@pytest.mark.slow
def test_threads_and_their_routes() -> None:
    model = build("bert")
    adapters = adapted(model, "ept")
    inputs = batch(model, rows=3)
    with torch.no_grad():
        wanted = {task: output(model, inputs, task_ids=task) for task in range(3)}
    wrong: list[int] = []

    def serve(task: int) -> None:
        for _ in range(20):
            with torch.no_grad(), adapters.route(task_ids=task):
                if not torch.equal(output(model, inputs), wanted[task]):
                    wrong.append(task)

    threads = [threading.Thread(target=serve, args=(task,)) for task in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Checkpointed(Host):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, *, reentrant: bool | None = False) -> Tensor:
        for block in self.blocks:
            x = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
        return x


def test_a_block_computed_again_sees_its_own_forward() -> None:
    """Two forwards of other tasks wait for one backward."""
    gradients = []
    for reentrant in (None, False):
        adapters = adapted(Checkpointed(*FORMS["rows first"]))
        x = torch.linspace(-1, 1, ROWS * POSITIONS * WIDTH).reshape(ROWS, POSITIONS, WIDTH)
        model = adapters.model.train()
        inputs = [x.clone(), x.clone()]
        outputs = [model(x, task_ids=ids, reentrant=reentrant) for x, ids in zip(inputs, (IDS, IDS[::-1]), strict=True)]
        torch.stack(outputs).square().sum().backward()
        gradients.append([parameter.grad for parameter in adapters.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_one_tensor_in_two_forwards_that_wait_is_refused() -> None:
    model = adapted(Checkpointed(*FORMS["rows first"])).model.train()
    x = torch.randn(ROWS, POSITIONS, WIDTH)
    outputs = [model(x, task_ids=ids) for ids in (IDS, IDS[::-1])]
    with pytest.raises(MissingRouting, match="backward after each forward"):
        torch.stack(outputs).sum().backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_that_would_lose_the_gradients_is_refused() -> None:
    adapters = adapted(Checkpointed(*FORMS["rows first"]), "lora")
    with pytest.raises(GradientsLost, match="use_reentrant"):
        adapters.model.train()(torch.randn(ROWS, POSITIONS, WIDTH), reentrant=True)


@pytest.mark.parametrize("how", ["tied", "a view", "weight_norm", "parametrized", "pruned"])
def test_a_weight_that_is_not_the_layers_own_does_not_merge(how: str) -> None:
    model = Host(*FORMS["rows first"])
    one, other = model.blocks[0][0], model.blocks[1][0]
    if how == "tied":
        other.weight = one.weight
    elif how == "a view":
        other.weight = nn.Parameter(one.weight.data.T)
    elif how == "weight_norm":
        nn.utils.parametrizations.weight_norm(one)
    elif how == "parametrized":
        nn.utils.parametrize.register_parametrization(one, "weight", nn.Tanh())
    else:
        prune.random_unstructured(one, "weight", 0.5)
    before = [layer.weight.clone() for layer in (one, other)]
    adapters = adapted(model, "lora")
    with pytest.raises(NotMergeable, match=r"blocks\.0\.0"):
        adapters.merge()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip((one, other), before, strict=True))


def test_disabled_while_merged_is_the_bare_model_and_every_order_gives_the_bits_back() -> None:
    bare = build("bert")
    inputs, weights = batch(bare), bare.state_dict()
    expected = output(bare, inputs)
    model = build("bert")
    adapters = adapted(model, "lora")
    adapters.merge()
    merged = output(model, inputs)
    with adapters.disabled():
        assert torch.equal(output(model, inputs), expected)
    assert torch.equal(output(model, inputs), merged)
    adapters.unmerge()
    adapters.merge()
    adapters.detach()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(output(model, inputs), expected)
