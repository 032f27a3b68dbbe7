"""What a row is at a layer, and what one call says of it.

A call of a model, or of a part of it, has a main input: token ids, their embeddings, pixels, audio, or the first
tensor. Dimension 0 of the main input is the batch. Parts of a model are called in turn, each with an input of its own,
so every call opens a `Scope`: how many rows and positions its layers get, and which masks hold for them. Rows of an
inner call are told apart by what is known: the same number as outside; a view of the outer input with its first two
dimensions made one (choices, frames of a video); nothing else. Task ids are never dealt because a number divides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .masks import Mask, UnknownMask, mask_of, unknown_mask_of
from .roles import Stream

# A part of a model that takes one of these has rows and masks of its own: it is a tower. Others take hidden states.
_RAW = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")
_RAW_OF_DECODERS = ("decoder_input_ids", "decoder_inputs_embeds")
_NO_MAIN_INPUT = ("task_ids", "labels", "attention_mask", "decoder_attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True, eq=False, slots=True)
class Scope:
    """What one call of a model or of a part of it knows. No tuple: torch 2.11 compiles none that outlives the graph.

    Attributes:
        rows: number of rows; None where nothing is known.
        tokens: positions of a row; None where a row has none or where nothing is known.
        copies: how often each task id stands, in place; None if the order is not known.
        masks: per stream the masks of this call first, then those of the calls around it.
        main: the main input, while the call runs.
        sequence_first: the main input is (positions, rows, features).
        unknown_mask: an argument that seems to be a mask and whose meaning is not known.
        square: the main input has as many positions as rows, and nothing tells which come first.
        learned: number of positions of a table of the model, the same for all rows, that the call is made with, as
            Perceiver's latents or the queries of a Q-Former: they are real, and no mask from outside is theirs.
    """

    rows: int | None = None
    tokens: int | None = None
    copies: int | None = 1
    masks: Mapping[Stream, tuple[Mask, ...]] = field(default_factory=dict)
    main: Tensor | None = None
    sequence_first: bool = False
    unknown_mask: UnknownMask | None = None
    square: bool = False
    learned: int | None = None

    def past_the_call(self) -> Scope:
        """The same without the input, for what outlives the call."""
        return self.with_call(None, self.masks, self.unknown_mask, self.learned)

    def with_call(
        self,
        main: Tensor | None,
        masks: Mapping[Stream, tuple[Mask, ...]],
        unknown_mask: UnknownMask | None,
        learned: int | None,
    ) -> Scope:
        """The same rows and positions with what else a call says."""
        own = self.rows, self.tokens, self.copies
        return Scope(*own, masks, main, self.sequence_first, unknown_mask, self.square, learned)


def looks_transposed(x: Tensor) -> bool:
    """Whether the steps in memory are those of (positions, rows, features) made from rows, or the other way round.

    A table that is expanded over the rows has a step of 0, and its rows come first.
    """
    return x.dim() == 3 and 0 < x.stride(0) < x.stride(1)


def open_scope(
    call: Mapping[str, Any], around: Scope | None, part: Part, ids: int | None, copies: int, seen: list[Mask]
) -> Scope:
    """The scope of a call.

    Args:
        call: its arguments by name.
        around: the scope of the call that it is a part of, None if it begins a forward.
        part: what is called.
        ids: number of task ids; None if there are none.
        copies: how often `generate` repeats each row, in place.
        seen: the forward's masks: blocks are all given the same, and a mask is made ready once.
    """
    call = _flat(call)
    raw, main = _main_input(call, part, around)
    if main is None:
        return around or Scope()
    batch_first = around is not None or any(main is call.get(name) for name in (*_RAW, *_RAW_OF_DECODERS))
    if not batch_first and _has_positions_first(main, ids):
        scope = Scope(rows=ids, tokens=main.shape[0], sequence_first=True)
    else:
        scope = _rows_and_tokens(main, raw, around, ids, copies, part.sequence_first)
    masks = {
        stream: tuple([_known(mask, seen) for mask in found])
        for stream, found in _masks(call, around, part, tower=raw, main=main).items()
    }
    # What the parts of a model of transformers call masks was made of what the model was given.
    unknown = unknown_mask_of(call, part.known_masks) if around is None or not part.known_masks else None
    learned = None if raw or around is None else _learned(call, main, scope, around)
    unknown = unknown or (around.unknown_mask if around else None)
    return scope.with_call(main, masks, unknown, learned)


def _known(mask: Mask, seen: list[Mask]) -> Mask:
    """The mask that was made of the same tensor before, or this one. A compiler would keep a graph for each `id`."""
    for one in seen:
        if one.given is mask.given:
            return one
    seen.append(mask)
    return mask


def _learned(call: Mapping[str, Any], main: Tensor, scope: Scope, around: Scope) -> int | None:
    """`Scope.learned` of an inner call: a view of a parameter begins the part, whose blocks follow it."""
    if main.dim() != 3 or not main.is_floating_point() or call.get("attention_mask") is not None:
        return around.learned
    spread = main.shape[0] > 1 and main.stride(0) == 0
    if spread or (not torch.compiler.is_compiling() and isinstance(main._base, nn.Parameter)):
        return scope.tokens
    return around.learned


class Part(NamedTuple):
    """What is called: a model or a part of it.

    Attributes:
        module: the module.
        stream: the stream of its hidden states.
        two_streams: it is, or is part of, an encoder-decoder model.
        known_masks: its model names masks as transformers does.
        sequence_first: it takes hidden states as (positions, rows, features).
    """

    module: nn.Module
    stream: Stream
    two_streams: bool
    known_masks: bool
    sequence_first: bool = False


def _flat(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments, those inside of a dictionary included, as SentenceTransformer passes them."""
    inner = [value for value in call.values() if isinstance(value, Mapping) and "input_ids" in value]
    return {**call, **inner[0]} if inner else call


def _main_input(call: Mapping[str, Any], part: Part, around: Scope | None) -> tuple[bool, Tensor | None]:
    """Whether the call has an input of its own, and the main one."""
    names = (*_RAW_OF_DECODERS, *_RAW) if call.get("encoder_outputs") is not None else (*_RAW, *_RAW_OF_DECODERS)
    for name in names:
        if isinstance(call.get(name), Tensor):
            return True, call[name]
    tensors = (
        value
        for name, value in call.items()
        if isinstance(value, Tensor) and value.dim() and name not in _NO_MAIN_INPUT and "mask" not in name
    )
    return around is None, next(tensors, None)


def is_tower(call: Mapping[str, Any]) -> bool:
    """Whether the call has an input of its own, and no hidden states of the call around it."""
    return any(isinstance(call.get(name), Tensor) for name in (*_RAW, *_RAW_OF_DECODERS))


def _has_positions_first(main: Tensor, ids: int | None) -> bool:
    """Whether a main input that no model of transformers names so has as many rows as there are ids in dimension 1."""
    return ids not in (None, 1, main.shape[0]) and main.dim() == 3 and main.shape[1] == ids and main.is_floating_point()


def _rows_and_tokens(
    main: Tensor, raw: bool, around: Scope | None, ids: int | None, copies: int, sequence_first: bool
) -> Scope:
    rows, features = main.shape[0], main.is_floating_point()
    tokens: int | None = None
    if main.dim() == 2 and not features:
        tokens = main.shape[1]
    elif main.dim() in (3, 4) and features:
        tokens = main.shape[1:-1].numel()
    if around is None:
        return Scope(rows=rows, tokens=tokens, copies=copies if ids is not None and ids * copies == rows else 1)
    sequence_first = sequence_first or around.sequence_first
    if main.shape[:2] == (around.rows, around.rows) and rows > 1 and looks_transposed(main) and not sequence_first:
        return Scope(rows=rows, tokens=tokens, copies=around.copies, square=True)
    if around.rows is None or (rows == around.rows and not (sequence_first and main.shape[1:2] == (rows,))):
        return Scope(rows=rows, tokens=tokens, copies=around.copies)
    positions_first = features and main.dim() == 3 and main.shape[1] == around.rows
    if positions_first and (rows == around.tokens or around.tokens is None or rows % around.rows):
        return Scope(rows=around.rows, tokens=rows, copies=around.copies, sequence_first=True)
    if not raw and main.dim() == 2 and around.tokens is not None and rows == around.rows * around.tokens:
        return around
    parts = _view_of_outer(main, around)
    known = parts is not None and around.copies is not None
    return Scope(rows=rows, tokens=tokens, copies=around.copies * parts if known else None)  # type: ignore[operator]


def _view_of_outer(main: Tensor, around: Scope) -> int | None:
    """How many rows each outer row was made into, if the input is the outer one with two dimensions made one."""
    outer = around.main
    if outer is None or outer.dim() < 3 or main.shape != (outer.shape[0] * outer.shape[1], *outer.shape[2:]):
        return None
    return outer.shape[1] if main.data_ptr() == outer.data_ptr() else None


def _masks(
    call: Mapping[str, Any], around: Scope | None, part: Part, *, tower: bool, main: Tensor
) -> dict[Stream, tuple[Mask, ...]]:
    """The masks of each stream, innermost first. A tower's layers see its own masks only."""
    outer = dict(around.masks) if around is not None else {}
    past = past_positions(call)
    frames = getattr(part.module, "_get_feat_extract_output_lengths", None) if main.is_floating_point() else None
    own = mask_of(call.get("attention_mask"), past, frames)
    if own is not None and around is not None and _is_internal(own, around):
        own = None
    cross = mask_of(call.get("encoder_attention_mask"))
    decoder = mask_of(call.get("decoder_attention_mask"), past) or _targets(call, part)
    given: dict[Stream, Mask | None] = {
        "encoder": cross or (own if part.stream == "encoder" else None),
        "decoder": decoder or (own if part.stream == "decoder" else None),
    }
    if tower and not part.two_streams and around is not None and not _same_input(main, around):
        outer = {}
    return {
        stream: (*((mask,) if mask is not None else ()), *outer.get(stream, ()))  # innermost first
        for stream, mask in given.items()
    }


def _is_internal(mask: Mask, around: Scope) -> bool:
    """Whether a part's mask is its model's own form of what the model was given.

    In a bool mask of queries and keys true means attend in most models and hide in others (MPT). Such a mask knows no
    more of padding than the masks of the same positions that the model was given, whose meaning is documented; where
    the model was given none, nothing is padding.
    """
    if mask.given.dim() < 3 or mask.given.dtype != torch.bool:
        return False
    known = [one for masks in around.masks.values() for one in masks]
    if not known:
        return around.unknown_mask is None
    return any(one.given.shape[-1] == mask.given.shape[-1] for one in known)


def _same_input(main: Tensor, around: Scope) -> bool:
    """Whether the input stands for the positions of the outer one."""
    outer = around.main
    if outer is None:
        return False
    return main.shape == outer.shape or (around.tokens is not None and main.shape[:2] == (around.rows, around.tokens))


def _targets(call: Mapping[str, Any], part: Part) -> Mask | None:
    """Which positions of the decoder predict a token, where no mask says so."""
    if not part.two_streams:
        return None
    labels, inputs = call.get("labels"), call.get("decoder_input_ids")
    if getattr(part.module, "get_output_embeddings", lambda: None)() is None:  # its labels are no tokens
        return None
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        # The decoder's position i predicts label i; -100 marks the positions that pad the target.
        return Mask((labels != -100).long())
    config = getattr(part.module, "config", None)
    pad, end = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    whole = isinstance(inputs, Tensor) and inputs.dim() == 2 and inputs.shape[1] > 1
    if labels is not None or not whole or not isinstance(pad, int) or call.get("past_key_values") is not None:
        return None
    assert isinstance(inputs, Tensor)
    return Mask(_predicting(inputs, pad, end))


def _predicting(inputs: Tensor, pad: int, end: Any) -> Tensor:
    """Positions of shifted targets before the padding that ends a row; what follows the end of a text predicts none."""
    followed = (inputs.flip(1) != pad).cumsum(dim=1).flip(1) > 0
    followed[:, 0] = True  # the start, which may be the padding token
    if isinstance(end, int):
        last = inputs == end
        last[:, 0] = False
        followed = followed & ~last
    return followed.long()


def past_positions(call: Mapping[str, Any]) -> int | Tensor:
    """Number of positions in the call's key-value cache; where a static cache counts them on the device, left there."""
    past = call.get("past_key_values")
    length = getattr(past, "get_seq_length", None)
    number = 0 if length is None else length()
    return number.clone() if isinstance(number, Tensor) else int(number)  # the cache goes on counting in place


def continues(call: Mapping[str, Any]) -> bool | Tensor:
    """Whether the call goes on from an earlier one: a step of cached decoding, or a decoder after its encoder."""
    if call.get("encoder_outputs") is not None:
        return True
    past = call.get("past_key_values")
    if past is None:
        return False
    return past_positions(call) > 0 if hasattr(past, "get_seq_length") else True
