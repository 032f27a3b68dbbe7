"""Calls that go on from earlier ones go on from their own, whatever was called between."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import moepeft
from tests.support.hosts import VOCABULARY, build

STEPS = 3


@pytest.fixture(scope="module")
def adapters() -> moepeft.Attachment:
    """TuckA, which routes a prompt once, and holds the route for what is decoded after it."""
    adapters = moepeft.attach(build("llama"), moepeft.method("tucka"))
    adapters.model(prompt(0))
    for parameter in adapters.parameters():
        parameter.data.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return adapters


def prompt(seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (1 + seed, 4), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decoding(model: Any, ids: Tensor, *, copied: bool = False) -> Iterator[Tensor]:
    """Logits step by step, with a cache."""
    cache = None
    for _ in range(STEPS):
        output = model(ids, past_key_values=cache, use_cache=True)
        cache = copy.deepcopy(output.past_key_values) if copied else output.past_key_values
        ids = output.logits[:, -1:].argmax(-1)
        yield output.logits[:, -1]


@pytest.mark.parametrize("copied", [False, True])
def test_texts_that_are_decoded_in_turn_are_what_they_are_one_after_the_other(
    adapters: moepeft.Attachment, copied: bool
) -> None:
    wanted = [list(decoding(adapters.model, prompt(seed))) for seed in (0, 1)]
    found = list(zip(*(decoding(adapters.model, prompt(seed), copied=copied) for seed in (0, 1)), strict=True))
    for step, pair in enumerate(found):
        for seed in (0, 1):
            assert torch.equal(pair[seed], wanted[seed][step])


def test_another_thread_goes_on_with_a_text(adapters: moepeft.Attachment) -> None:
    wanted, steps = list(decoding(adapters.model, prompt(1))), decoding(adapters.model, prompt(1))
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        found = [pool.submit(next, steps).result() for pool in (one, other, one)]
    assert all(torch.equal(*each) for each in zip(found, wanted, strict=True))


@torch.no_grad()
def test_a_decoder_goes_on_from_its_own_encoder() -> None:
    model: Any = build("t5")
    adapters = moepeft.attach(model, moepeft.method("tucka"))
    model(input_ids=prompt(0), decoder_input_ids=prompt(0))
    for parameter in adapters.parameters():
        parameter.data.add_(0.5 * torch.randn(parameter.shape))
    wanted = model(input_ids=prompt(0), decoder_input_ids=prompt(0)).logits
    own, _ = model.encoder(prompt(0)), model.encoder(prompt(1))
    torch.testing.assert_close(model(encoder_outputs=own, decoder_input_ids=prompt(0)).logits, wanted)
