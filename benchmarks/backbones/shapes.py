"""Models of the true shapes, built from their configurations alone: counts and speed need no weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _t5_base() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    # google-t5/t5-base
    config = T5Config(
        d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_heads=12, vocab_size=32128, decoder_start_token_id=0
    )
    model: nn.Module = T5ForConditionalGeneration(config)
    return model


def _llama_2_7b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    # meta-llama/Llama-2-7b-hf
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def _deberta_v3_base() -> nn.Module:
    from transformers import DebertaV2Model

    model: nn.Module = DebertaV2Model(_deberta_v3_base_config())
    return model


def _deberta_v3_base_classifier() -> nn.Module:
    from transformers import DebertaV2ForSequenceClassification

    model: nn.Module = DebertaV2ForSequenceClassification(_deberta_v3_base_config())
    return model


def _deberta_v3_base_config() -> Any:
    from transformers import DebertaV2Config

    # microsoft/deberta-v3-base
    return DebertaV2Config(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=128100,
        max_position_embeddings=512,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        layer_norm_eps=1e-7,
        pooler_hidden_size=768,
    )


def _minilm() -> nn.Module:
    from transformers import BertConfig, BertModel

    # sentence-transformers/all-MiniLM-L6-v2
    config = BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12, vocab_size=30522
    )
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "t5-base": _t5_base,
    "llama-2-7b": _llama_2_7b,
    "deberta-v3-base": _deberta_v3_base,
    "deberta-v3-base-classifier": _deberta_v3_base_classifier,
    "minilm": _minilm,
}


class UnknownShape(ValueError):
    """No model of that name is known, and it is no ``INxOUT`` either."""


def build_shape(name: str, device: str | torch.device = "meta") -> nn.Module:
    """A model of the named shape with random weights (none at all on the meta device).

    Args:
        name: one of `SHAPES`, or ``768x3072`` for a single linear layer of that input and output width.
        device: where the weights are made.
    """
    single = re.fullmatch(r"(\d+)x(\d+)", name)
    with torch.device(device):
        if single:
            return nn.Sequential(nn.Linear(int(single[1]), int(single[2]), bias=False))
        if name not in SHAPES:
            raise UnknownShape(f"unknown shape {name!r}: give one of {', '.join(SHAPES)}, or INxOUT such as 768x3072")
        return SHAPES[name]()
