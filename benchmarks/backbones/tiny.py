"""Random models of two layers and a tokenizer over letters: for tests and for trying a command, offline."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Family
from benchmarks.protocols.seeds import torch_stream

_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PAD, _CLS, _SEP = 0, 2, 3
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def _bert(set_up: Callable[[Any], None]) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=_vocabulary_size(), max_position_embeddings=512, **_SIZES)
    return _model(BertModel, config, set_up, add_pooling_layer=False)


def _t5(set_up: Callable[[Any], None]) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        vocab_size=_vocabulary_size(),
        pad_token_id=_PAD,
        eos_token_id=_SEP,
        decoder_start_token_id=_PAD,
    )
    return _model(T5ForConditionalGeneration, config, set_up)


def _llama(set_up: Callable[[Any], None]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_vocabulary_size(),
        num_key_value_heads=2,
        pad_token_id=_PAD,
        bos_token_id=_CLS,
        eos_token_id=_SEP,
        **_SIZES,
    )
    return _model(LlamaForCausalLM, config, set_up)


def _model(kind: Callable[..., nn.Module], config: Any, set_up: Callable[[Any], None], **options: Any) -> nn.Module:
    set_up(config)
    return kind(config, **options)


# Name -> what it is built for, how, and what its tokenizer puts around a text.
TINY_MODELS: Mapping[str, tuple[Family, Callable[[Callable[[Any], None]], nn.Module], str]] = {
    "tiny-bert": ("encoder", _bert, "[CLS] $A [SEP]"),
    "tiny-t5": ("seq2seq", _t5, "$A [SEP]"),
    "tiny-llama": ("causal", _llama, "[CLS] $A"),
}


def build_tiny(name: str, family: Family, set_up: Callable[[Any], None]) -> nn.Module:
    """A random model, the same in every process.

    Args:
        name: one of `TINY_MODELS`.
        family: what it is wanted for.
        set_up: is given the configuration before the model is built.

    Raises:
        UsageError: the model is of another family.
    """
    own, build, _ = TINY_MODELS[name]
    if family != own:
        fitting = " or ".join(other for other, (kind, _, _) in TINY_MODELS.items() if kind == family)
        raise UsageError(f"backbone {name} is of family {own}, and the protocol wants {family}: give {fitting}")
    with torch_stream(name):
        return build(set_up)


def tiny_tokenizer(name: str = "tiny-bert") -> Any:
    """A WordPiece tokenizer over letters and pairs of letters: fixed, offline, and not too long-winded.

    Args:
        name: the one of `TINY_MODELS` it is for. Text answers need an end: there ``[SEP]`` is the end of a text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: position for position, token in enumerate(_vocabulary())}
    family, _, single = TINY_MODELS[name]
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=_SPECIAL_TOKENS[1]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    special = {f"{token.strip('[]').lower()}_token": token for token in _SPECIAL_TOKENS}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    if family != "encoder":
        tokenizer.decoder = decoders.WordPiece()
        special["eos_token"] = _SPECIAL_TOKENS[_SEP]
        names.remove("token_type_ids")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special)


def _vocabulary() -> Iterator[str]:
    yield from _SPECIAL_TOKENS
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pairs = ["".join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=2)]
    for piece in (*characters, *pairs):
        yield piece
        yield f"##{piece}"


def _vocabulary_size() -> int:
    return sum(1 for _ in _vocabulary())
