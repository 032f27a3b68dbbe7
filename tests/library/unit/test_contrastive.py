"""The contrastive loss of the releases in a model with as many layers as T5-base."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import moepeft
from moepeft.registry import factory_class

# Methods whose release counts the encoder's sites alone.
ENCODER_ONLY = [
    name
    for name in moepeft.available()
    if factory_class(name).presets["released"].get("contrastive_sites") == "encoder"
]
IDS = torch.tensor([3, 0, 5])


@pytest.fixture
def model() -> T5ForConditionalGeneration:
    """T5-base in layers and sites, narrow."""
    config = T5Config(
        d_model=16,
        d_ff=24,
        d_kv=4,
        num_heads=4,
        num_layers=12,
        vocab_size=30,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).double()


@pytest.mark.parametrize("name", ENCODER_ONLY)
def test_release_averages_over_the_72_encoder_sites(name: str, model: T5ForConditionalGeneration) -> None:
    factory = moepeft.method(f"{name}@released", rank=4, num_tasks=8, dropout=0.0)
    adapters = moepeft.attach(model, factory)
    model.double().train()
    first: dict[str, Tensor] = {}
    for site in adapters.sites:
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda module, args, key=site.name: first.__setitem__(key, args[0][:, 0])
        )
    tokens, labels = torch.randint(2, 30, (3, 6)), torch.randint(2, 30, (3, 4))
    model(input_ids=tokens, labels=labels, task_ids=IDS)
    loss = adapters.aux_loss()

    encoder = [site.name for site in adapters.sites if site.name.startswith("encoder.")]
    assert (len(encoder), len(adapters.sites)) == (72, 192)
    own = []
    for key in encoder:
        table = adapters.adapters[key].task_embedding
        cosines = F.cosine_similarity(first[key].unsqueeze(1), table.unsqueeze(0), dim=-1)
        own.append(F.cross_entropy(cosines / 0.05, IDS))
    torch.testing.assert_close(loss, 0.1 * torch.stack(own).mean(), rtol=1e-10, atol=1e-12)

    loss.backward()
    tables = {key: adapter.task_embedding.grad for key, adapter in adapters.adapters.items()}
    assert all(bool(tables[key].any()) for key in encoder)
    assert not [key for key, gradient in tables.items() if key not in encoder and gradient is not None]


@pytest.mark.parametrize("name", ENCODER_ONLY)
def test_published_presets_average_over_all_sites(name: str, model: T5ForConditionalGeneration) -> None:
    adapters = moepeft.attach(model, moepeft.method(name, rank=4, num_tasks=8))
    model.double().train()
    model(input_ids=torch.randint(2, 30, (3, 6)), labels=torch.randint(2, 30, (3, 4)), task_ids=IDS)
    assert len(adapters.runtime.last.losses["contrastive"]) == 192
