"""Inputs of other positions than the call has: experts, global positions, tables that a part of a model begins with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MptConfig, MptForCausalLM, XLNetConfig, XLNetModel

import moepeft
from moepeft.errors import MissingRouting, Unsupported
from tests.support.hosts import build

WIDTH, ROWS, POSITIONS = 8, 3, 5
IDS = [0, 1, 2]


def adapted(model: nn.Module, spec: str = "moelora", **selected: Any) -> moepeft.Attachment:
    adapters = moepeft.attach(model.eval(), moepeft.method(spec, num_tasks=3), **selected)
    for parameter in adapters.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return adapters


def assert_rows_stand_alone(model: nn.Module, x: Tensor, **more: Any) -> None:
    mixed = model(x, task_ids=IDS, **more)
    for row, task in enumerate(IDS):
        torch.testing.assert_close(mixed[[row]], model(x[[row]], task_ids=task, **more), rtol=0, atol=1e-5)


class Mixture(nn.Module):
    """Blocks of a projection and of experts, each of which gets the tokens whose first feature says so."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        parts = {"proj": nn.Linear(WIDTH, WIDTH), name: nn.ModuleDict({f"expert_{e}": self._expert() for e in (0, 1)})}
        self.blocks = nn.ModuleList([nn.ModuleDict(parts)])

    @staticmethod
    def _expert() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[..., 0] > 0).long().flatten()
        for block in self.blocks:
            tokens = block["proj"](x).flatten(0, 1)
            total = torch.zeros_like(tokens)
            for index in chosen.unique().tolist():
                total[chosen == index] = block[self.name][f"expert_{index}"](tokens[chosen == index])
            x = x + total.view_as(x)
        return x


def tokens_for_experts(second: int) -> Tensor:
    """Random rows of which as many tokens, from the middle on, go to the second expert."""
    x = torch.randn(ROWS, POSITIONS, WIDTH)
    x[..., 0] = -x[..., 0].abs()
    x.view(-1, WIDTH)[POSITIONS : POSITIONS + second, 0] *= -1
    return x


@pytest.mark.parametrize("spec", ["moelora", "mola", "tucka"])
def test_what_needs_to_know_the_rows_leaves_experts_out_and_says_so(spec: str) -> None:
    with pytest.warns(UserWarning, match="4 x a layer of an expert"):
        adapters = adapted(Mixture("experts"), spec)
    assert [site.name for site in adapters.sites] == ["blocks.0.proj"]
    assert "4 x a layer of an expert" in adapters.summary()
    if spec == "moelora":
        assert_rows_stand_alone(adapters.model, tokens_for_experts(second=ROWS))
    with pytest.raises(Unsupported, match="layer of an expert"):
        moepeft.attach(Mixture("experts"), moepeft.method(spec, num_tasks=3), sites=["experts"])
    assert len(adapted(Mixture("experts"), "lora", sites=["experts"]).sites) == 4


@pytest.mark.parametrize("second", [ROWS, POSITIONS, ROWS * POSITIONS - POSITIONS])
def test_as_many_tokens_as_rows_are_not_the_rows(second: int) -> None:
    """Experts of any other name."""
    adapters = adapted(Mixture("nets"))
    with pytest.raises(MissingRouting, match=r"nets\.expert_0"):
        adapters.model(tokens_for_experts(second), task_ids=IDS)
    adapters.model(tokens_for_experts(second), task_ids=1)


class Attention(nn.Module):
    """As Longformer's: positions come first, and the first few of them go through a projection of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.query_global = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, few: int) -> Tensor:
        x = x.transpose(0, 1)
        y = self.query(x).tanh()
        first = self.query_global(x[:few].contiguous())
        return torch.cat([first, y[few:]]).transpose(0, 1)


class Long(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor, few: int) -> Tensor:
        for block in self.blocks:
            x = block(x, few)
        return x


@pytest.mark.parametrize("few", [1, 2, 4])
def test_fewer_positions_stand_as_the_other_layers_of_the_module_have_them(few: int) -> None:
    assert_rows_stand_alone(adapted(Long()).model, torch.randn(ROWS, POSITIONS, WIDTH), few=few)


def test_as_many_positions_as_rows_are_refused_until_the_layer_has_shown_its_form() -> None:
    model, x = adapted(Long()).model, torch.randn(ROWS, POSITIONS, WIDTH)
    with pytest.raises(MissingRouting, match="query_global"):
        model(x, task_ids=IDS, few=ROWS)
    model(x, task_ids=IDS, few=1)
    assert_rows_stand_alone(model, x, few=ROWS)


class Latent(nn.Module):
    """As Perceiver: latents, the same for all rows, read the input and go through the blocks in place of the input."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))

        def forward(self, hidden_states: Tensor, inputs: Tensor, visible: Tensor) -> Tensor:
            read = (hidden_states @ inputs.transpose(1, 2)).masked_fill(~visible.bool()[:, None], -1e9).softmax(-1)
            x = hidden_states + read @ inputs
            for block in self.blocks:
                x = block(x)
            return x

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, WIDTH))
        self.encoder = self.Encoder()

    def forward(self, inputs: Tensor, attention_mask: Tensor) -> Tensor:
        y: Tensor = self.encoder(self.latents.expand(len(inputs), -1, -1), inputs, attention_mask)
        return y


def losses(adapters: moepeft.Attachment, x: Tensor, mask: Tensor, ids: list[int]) -> Tensor:
    adapters.model.train()
    adapters.model(x, attention_mask=mask, task_ids=ids)
    return adapters.aux_loss().detach()


@pytest.mark.parametrize("rows", [[0, 1, 2], [1]])
def test_the_mask_of_the_input_is_not_laid_on_latents(rows: list[int]) -> None:
    """They are real, all of them: the loss is what it is when the padding is cut off."""
    adapters = adapted(Latent(4), "mola")
    x, ids = torch.randn(ROWS, POSITIONS, WIDTH)[rows], [IDS[row] for row in rows]
    mask = (torch.arange(POSITIONS) < 3).long().expand(len(rows), -1)
    cut = losses(adapters, x[:, :3], mask[:, :3], ids)
    torch.testing.assert_close(losses(adapters, x, mask, ids), cut)
    same_number = adapted(Latent(POSITIONS), "mola")
    with pytest.raises(MissingRouting, match="padding mask"):
        losses(same_number, x, mask, ids)
    losses(same_number, x, torch.ones_like(mask), ids)
    with same_number.route(mask=torch.ones_like(mask)):
        losses(same_number, x, mask, ids)


@pytest.mark.filterwarnings("ignore")  # no adapter reaches the attention, most of an XLNet this small
def test_a_mask_of_another_name_is_refused_where_it_tells_positions_apart() -> None:
    """XLNet's `input_mask` says 1 on padding."""
    config = XLNetConfig(vocab_size=40, d_model=WIDTH, n_layer=1, n_head=2, d_inner=2 * WIDTH)
    adapters = adapted(XLNetModel(config).train(), "mola")
    ids, mask = torch.randint(3, 40, (ROWS, POSITIONS)), torch.zeros(ROWS, POSITIONS)
    model = adapters.model.train()
    model(ids, input_mask=mask)
    mask[1, 0] = 1
    with pytest.raises(MissingRouting, match="input_mask"):
        model(ids, input_mask=mask)
    with adapters.route(mask=1 - mask):
        model(ids, input_mask=mask)


def test_as_many_ids_as_positions_are_not_dealt_to_positions() -> None:
    model = build("bert")
    adapted(model)
    with pytest.raises(MissingRouting, match="3 task ids for 4 rows"):
        model(inputs_embeds=torch.randn(4, 3, model.config.hidden_size), task_ids=IDS)


@pytest.mark.parametrize("told", ["mask", "no mask"])
def test_a_hosts_own_bool_mask_says_no_more_than_the_model_was_given(told: str) -> None:
    """MPT hands its blocks a mask in which true hides a key; most other models' true lets it be attended to."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 32}
    model = MptForCausalLM(MptConfig(vocab_size=64, **sizes)).eval()
    adapters = moepeft.attach(model, moepeft.method("mixlora", rank=2, num_experts=4))
    model.train()
    ids, mask = torch.randint(64, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    if told == "mask":
        mask[0, 6:] = 0
        other = torch.where(mask.bool(), ids, 7)
        calls = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": other, "attention_mask": mask}]
    else:
        calls = [{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}]
    losses = []
    for call in calls:
        model(**call)
        losses.append(adapters.aux_loss().item())
    assert losses[0] > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
