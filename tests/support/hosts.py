"""Tiny random models of the architectures that adapters meet, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

WIDTH, VOCABULARY = 32, 64


def bert() -> nn.Module:
    return BertModel(_encoder(BertConfig), add_pooling_layer=False)


def roberta() -> nn.Module:
    return RobertaModel(_encoder(RobertaConfig), add_pooling_layer=False)


def deberta() -> nn.Module:
    return DebertaV2Model(
        # As deberta-v3-base: the position table goes through the same projections as the rows.
        _encoder(
            DebertaV2Config,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            share_att_key=True,
        )
    )


def _encoder(config: Callable[..., Any], **more: Any) -> Any:
    return config(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        **more,
    )


def t5(*, gated: bool = False) -> nn.Module:
    config = T5Config(
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
    return T5ForConditionalGeneration(config)


def gated_t5() -> nn.Module:
    return t5(gated=True)


def llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = GPT2Config(
        n_embd=WIDTH, n_inner=2 * WIDTH, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, pad_token_id=0
    )
    return GPT2LMHeadModel(config)


HOSTS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "t5": t5, "llama": llama}
MORE_HOSTS: dict[str, Callable[[], nn.Module]] = {
    "roberta": roberta,
    "deberta": deberta,
    "gated_t5": gated_t5,
    "gpt2": gpt2,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A host in eval mode; the same weights for the same seed."""
    torch.manual_seed(seed)
    return {**HOSTS, **MORE_HOSTS}[name]().eval()


def batch(model: nn.Module, *, rows: int = 4, length: int = 7, padded: int = 0, seed: int = 1) -> dict[str, Tensor]:
    """Random token ids. With `padded`, row i ends in (i % 2) * padded padding positions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        if padded and row % 2:
            mask[row, length - padded :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 5), generator=generator)
    return inputs


def output(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """Logits, or the last hidden state of a headless encoder."""
    result = model(**inputs, **more)
    value: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return value


def rows_of(inputs: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """Some rows of a batch."""
    return {name: value[rows] for name, value in inputs.items()}
