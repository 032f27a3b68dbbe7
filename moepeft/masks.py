"""What a mask is at a layer.

A padding mask says of every position of every row whether it is a real token. Models take such a mask in many forms:
(rows, positions) of ones and zeros, the same as numbers that are added to attention logits, or (rows, queries, keys).
`Mask` keeps what a call was given, and lays it on an input of a layer when a method asks. A mask is laid only where
its positions are the input's: as many of them, or the last ones under a key-value cache, or as many as the model's own
rule makes of audio frames. A mask that cannot be laid is never cut to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What is added to the logit of a key that may be attended to is no smaller.
_SMALLEST_BIAS = -5000.0
# What is named a mask and says nothing of padding.
_NO_PADDING = ("head_mask", "global_attention_mask", "perm_mask", "observed_mask", "special_tokens_mask", "loss_mask")


class Mask:
    """A mask as a call was given it.

    Args:
        given: the tensor, of 2, 3 or 4 dimensions.
        past: number of positions in the key-value cache before this call; on the device, it is read when it is needed.
        frames: lengths of audio -> number of positions that the model makes of them, if the mask is of frames.
    """

    def __init__(self, given: Tensor, past: int | Tensor = 0, frames: Callable[[Tensor], Tensor] | None = None) -> None:
        self.given = given
        self.past = past
        self.frames = frames
        self._real: Tensor | None = None
        self._laid: dict[tuple[int, int, int], Tensor | None] = {}

    def real(self) -> Tensor:
        """The mask as a bool tensor (rows, positions)."""
        if self._real is None:
            given = self.given
            if given.dim() == 4:
                given = given[:, 0]
            if given.dim() == 3:
                given = _own_keys(given, int(self.past))
            self._real = _attended(given)
        return self._real

    def on(self, rows: int, tokens: int, copies: int = 1) -> Tensor | None:
        """The mask of an input of `rows` rows and `tokens` positions, bool (rows, tokens); None if it is of others.

        Args:
            rows: of the input.
            tokens: positions of a row.
            copies: how often each row stands in the input, in place.
        """
        key = (rows, tokens, copies)
        if key not in self._laid:
            self._laid[key] = self._lay(rows, tokens, copies)
        return self._laid[key]

    def _lay(self, rows: int, tokens: int, copies: int) -> Tensor | None:
        real = self.real()
        if real.shape[1] != tokens:
            past = int(self.past)
            if past and real.shape[1] == past + tokens:
                real = real[:, past:]
            elif self.frames is not None:
                lengths = self.frames(real.sum(dim=1))
                real = torch.arange(tokens, device=real.device) < lengths.unsqueeze(1)
            else:
                return None
        if real.shape[0] == rows:
            return real
        if real.shape[0] == 1:
            return real.expand(rows, tokens)
        return real.repeat_interleave(copies, dim=0) if copies > 1 and real.shape[0] * copies == rows else None


def mask_of(given: Any, past: int | Tensor = 0, frames: Callable[[Tensor], Tensor] | None = None) -> Mask | None:
    """A call's argument as a mask; None if it is none, or of a form that says nothing of positions."""
    if isinstance(given, Mapping):  # one mask per kind of attention: padding is the same in all
        given = given.get("full_attention", next(iter(given.values()), None))
    if isinstance(given, Mask):
        return given
    if not isinstance(given, Tensor) or given.dim() not in (2, 3, 4):
        return None
    return Mask(given, past, frames)


def _own_keys(mask: Tensor, past: int) -> Tensor:
    """Of a mask (rows, queries, keys) what each query says of its own position: a token attends to itself."""
    queries, keys = mask.shape[-2:]
    if queries == 1 and not past:
        return mask[:, 0]
    offset = past if past + queries <= keys else keys - queries
    return torch.diagonal(mask, offset=offset, dim1=-2, dim2=-1)[..., :queries]


def _attended(mask: Tensor) -> Tensor:
    """Which entries are real, of ones and zeros or of numbers to be added to logits. No value leaves the device."""
    if not mask.is_floating_point():
        return mask.bool()
    ones_and_zeros = ((mask >= 0) & (mask <= 1)).all() & (mask > 0).any()
    return torch.where(ones_and_zeros, mask > 0, mask > _SMALLEST_BIAS)


class UnknownMask(NamedTuple):
    """An argument that seems to be a padding mask: its name, and its values."""

    name: str
    given: Tensor

    def tells_apart(self) -> bool:
        """Whether it says of some positions what it does not say of others. Compiled code takes it to."""
        return torch.compiler.is_compiling() or bool((self.given != self.given.flatten()[:1]).any())


def unknown_mask_of(call: Mapping[str, Any], of_transformers: bool) -> UnknownMask | None:
    """The first argument that seems to be a mask and is none of those whose meaning is known."""
    known = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask")
    for name, value in call.items():
        named_so = name.endswith("mask") and not name.endswith(_NO_PADDING) if of_transformers else "mask" in name
        if named_so and name not in known and isinstance(value, Tensor) and value.numel():
            return UnknownMask(name, value)
    return None
