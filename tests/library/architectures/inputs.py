"""Inputs of every kind of host, and the same inputs with other padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS, LENGTH, PADDED, TARGET = 3, 8, 3, 5
Inputs = dict[str, Tensor]


class Kind(NamedTuple):
    """What a kind of host is called with.

    Attributes:
        main: name of its main input.
        mask: name of the mask of the main input's positions, None where the kind has no padding.
        more: draws its other inputs.
        length: positions of the main input that are padded in the second row; ids where 0.
        generates: whether `generate` takes the same inputs.
    """

    main: str
    mask: str | None = None
    more: Callable[[torch.Generator], Inputs] = lambda generator: {}
    length: int = 0
    generates: bool = False


def _ids(generator: torch.Generator, length: int) -> Tensor:
    return torch.randint(6, 60, (ROWS, length), generator=generator)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=generator)


def _target(generator: torch.Generator) -> Inputs:
    return {"decoder_input_ids": _ids(generator, TARGET)}


def _global(generator: torch.Generator) -> Inputs:
    """The first position attends everywhere: layers for it run."""
    mask = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    mask[:, 0] = 1
    return {"global_attention_mask": mask}


def _image(generator: torch.Generator) -> Inputs:
    return {"pixel_values": _normal(generator, 3, 16, 16)}


KINDS: Mapping[str, Kind] = {
    "text": Kind("input_ids", "attention_mask"),
    "text with global attention": Kind("input_ids", "attention_mask", _global),
    "pairs with global attention": Kind("input_ids", "attention_mask", lambda g: _target(g) | _global(g)),
    "causal": Kind("input_ids", "attention_mask", generates=True),
    "pairs": Kind("input_ids", "attention_mask", _target, generates=True),
    "image": Kind("pixel_values"),
    "signal": Kind("input_values"),
    "series": Kind("past_values"),
    "arrays": Kind("inputs", "attention_mask"),
    "wave": Kind("input_values", "attention_mask", length=400),
    "frames": Kind("input_features", "attention_mask"),
    "speech": Kind("input_features", None, _target, generates=True),
    "speech frames": Kind("input_features", "attention_mask", _target, generates=True),
    "towers": Kind("input_ids", "attention_mask", _image),
    "eyes": Kind("input_ids", "attention_mask", _image),
}
IMAGE_TOKENS = 4  # of a 16 x 16 image in patches of 8, at the start of every row


def draw(kind: str, shape: tuple[int, ...] = (), seed: int = 1, *, padded: bool = True) -> Inputs:
    """Inputs of three rows; the last positions of the second one are padding where the kind knows padding."""
    generator = torch.Generator().manual_seed(seed)
    what = KINDS[kind]
    shape = shape or ((what.length,) if what.length else (LENGTH,))
    if what.main == "input_ids":
        main = _ids(generator, LENGTH)
        if kind == "eyes":
            main[:, :IMAGE_TOKENS] = 63
    else:
        main = _normal(generator, *shape)
    inputs = {what.main: main, **what.more(generator)}
    if what.mask is not None:
        mask = torch.ones(ROWS, shape[0], dtype=torch.long)
        if padded:
            mask[1, shape[0] - shape[0] * PADDED // LENGTH :] = 0
        inputs[what.mask] = mask
        inputs[what.main] = _where(mask, main, torch.zeros_like(main))
    return inputs


def other_padding(kind: str, inputs: Inputs, seed: int = 9) -> Inputs:
    """The same inputs with other values where the mask says padding."""
    what = KINDS[kind]
    assert what.mask is not None
    main, mask = inputs[what.main], inputs[what.mask]
    generator = torch.Generator().manual_seed(seed)
    noise = _ids(generator, main.shape[1]) if main.dtype == torch.long else _normal(generator, *main.shape[1:])
    return {**inputs, what.main: _where(mask, main, noise)}


def prompts(kind: str, inputs: Inputs) -> Inputs:
    """The inputs as `generate` takes them: decoders' padding on the left, no target of its own."""
    rest = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    return {name: value.flip(1) for name, value in rest.items()} if kind == "causal" else rest


def of_rows(inputs: Inputs, rows: list[int]) -> Inputs:
    """Some rows of a batch."""
    return {name: value[rows] for name, value in inputs.items()}


def tensors(output: Any, mask: Tensor | None = None) -> list[Tensor]:
    """The floating tensors of a model's output; of those that have the mask's positions, the real ones alone."""
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    found: list[Tensor] = []
    for value in values if isinstance(values, (tuple, list)) else [values]:
        if isinstance(value, (tuple, list)) or hasattr(value, "to_tuple"):
            found += tensors(value, mask)
        elif isinstance(value, Tensor) and value.is_floating_point():
            positions = mask is not None and value.shape[:2] == mask.shape
            found.append(value[mask.bool()] if positions else value)
    return found


def _where(mask: Tensor, main: Tensor, other: Tensor) -> Tensor:
    return torch.where(mask.bool().reshape(*mask.shape, *(1,) * (main.dim() - 2)), main, other)
