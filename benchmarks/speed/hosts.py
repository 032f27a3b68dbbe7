"""The frozen models that carry the contestants: true shapes, random weights, no dropout, one copy of the weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.backbones.load import set_dropout
from benchmarks.backbones.shapes import UnknownShape, build_shape
from benchmarks.protocols.errors import UsageError

Kind = Literal["layer", "encoder", "causal", "seq2seq"]


class FeedForward(nn.Module):
    """A network of one width, for methods that adapt whole feed-forward networks and no single layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, width, bias=False)
        self.down_proj = nn.Linear(width, width, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Linear, GELU, linear."""
        output: Tensor = self.down_proj(F.gelu(self.up_proj(input)))
        return output


# What the configurations call their sizes.
_TINY_SIZES = {
    **dict.fromkeys(("num_layers", "num_hidden_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("d_model", "hidden_size"), 32),
    **dict.fromkeys(("d_ff", "intermediate_size"), 64),
    "d_kv": 8,
    "vocab_size": 64,
}


def build_host(
    name: str, *, layers: int | None, device: torch.device, dtype: torch.dtype, tiny: bool = False
) -> nn.Module:
    """A model of the named shape (`benchmarks.backbones.shapes`), its weights drawn on `device` in `dtype`.

    Args:
        name: a shape's name or ``INxOUT``.
        layers: keep only so many layers (of encoder and decoder each); None keeps all.
        device: where the weights live.
        dtype: their type.
        tiny: cut the model down to two layers of width 32.

    Raises:
        UsageError: there is no such shape, or it has fewer layers.
    """
    try:
        meta = build_shape(name)
    except UnknownShape as error:
        raise UsageError(f"--backbone: {error}") from error
    config: Any = getattr(meta, "config", None)
    if config is None:
        if layers is not None:
            raise UsageError(f"--layers {layers}: {name} is a single layer; leave the flag out")
        with _default_dtype(dtype):
            return build_shape(name, device)
    # Dropout costs the same for all and would hide differences. Its rates are read while the model is built.
    set_dropout(config, 0.0)
    if tiny:
        for size in [size for size in _TINY_SIZES if hasattr(config, size)]:
            setattr(config, size, _TINY_SIZES[size])
    if layers is not None:
        _keep_layers(config, name, layers)
    with _default_dtype(dtype), torch.device(device):
        model: nn.Module = type(meta)(config)
    if getattr(meta, "pooler", None) is None and hasattr(model, "pooler"):
        setattr(model, "pooler", None)  # noqa: B010 - an option of the constructor that the configuration lacks
    return model


def _keep_layers(config: Any, name: str, layers: int) -> None:
    if not 1 <= layers <= config.num_hidden_layers:
        raise UsageError(f"--layers {layers}: {name} has {config.num_hidden_layers} layers; give 1 to that many")
    config.num_hidden_layers = layers
    if hasattr(config, "num_decoder_layers"):
        config.num_decoder_layers = layers


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the very tensors of `model`: ten copies of a 7B model fit where one does."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def kind_of(model: nn.Module) -> Kind:
    """What calls the model understands."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return "layer"
    if config.is_encoder_decoder:
        return "seq2seq"
    return "encoder" if model.get_output_embeddings() is None else "causal"  # type: ignore[operator]


def single_layer(name: str) -> tuple[int, int] | None:
    """Input and output width of the shape ``INxOUT``; None for the name of a model."""
    found = re.fullmatch(r"(\d+)x(\d+)", name)
    return (int(found[1]), int(found[2])) if found else None


def vocabulary_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """The modules that turn token ids into the first layer's input."""
    size = model.config.vocab_size  # type: ignore[union-attr]
    return [module for module in model.modules() if isinstance(module, nn.Embedding) and module.num_embeddings == size]
