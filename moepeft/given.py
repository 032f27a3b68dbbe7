"""What a user says of a batch, checked: task ids and padding masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import task_number
from .errors import MissingRouting
from .masks import mask_of
from .state import State


def checked_ids(state: State, task_ids: Any) -> Tensor:
    """The ids as a tensor of shape (rows, positions, ids), where one position stands for all positions of its row.

    Values are looked at on the CPU only: a GPU would have to wait.

    Args:
        state: of the model.
        task_ids: a number, (rows,), (rows, positions) for packed rows, or (rows, positions, ids) for methods that know
            several tasks at once, padded with -1.

    Raises:
        MissingRouting: they are no whole numbers, none at all, of a wrong shape or out of range.
    """
    try:
        ids = torch.as_tensor(task_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MissingRouting(f"task_ids={task_ids!r} are no whole numbers: number the tasks from 0") from error
    if not ids.numel():
        raise MissingRouting("task_ids are empty: give one per row")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise MissingRouting(f"task_ids are of type {ids.dtype}, wanted whole numbers, one per row: give integers")
    if ids.dim() > 3:
        raise MissingRouting(
            f"task_ids must have shape (rows,), (rows, positions) or (rows, positions, ids), got {tuple(ids.shape)}"
        )
    ids = ids.long().reshape(*ids.shape, *(1,) * (3 - ids.dim()))
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(state, ids)
    return ids


def check_packed(state: State, ids: Tensor, *, two_streams: bool) -> None:
    """Refuse ids of positions where a call has the positions of two sequences.

    Raises:
        MissingRouting: the model is an encoder-decoder model, and the method routes by task.
    """
    if two_streams and state.factory.capabilities.routing == "task":
        raise MissingRouting(
            f"task_ids have shape {tuple(ids.shape[:2])}, (rows, positions), but this encoder-decoder model has the "
            "positions of two sequences: give one id per row"
        )


def _check_range(state: State, ids: Tensor) -> None:
    number, low, high = task_number(state.factory), int(ids.min()), int(ids.max())
    if number is not None and (high >= number or low < (-1 if ids.shape[2] > 1 else 0)):
        raise MissingRouting(
            f"task_ids lie between {low} and {high}, but {state.factory.name} was configured with num_tasks="
            f"{number}: ids count from 0 to {number - 1}"
        )
    if ids.shape[2] > 1 and bool((ids < 0).all(2).any()):
        raise MissingRouting("task_ids have a row of -1 alone: give every row one task at least")
    serves = state.merged_task if state.runtime.settings.enabled else None
    if serves is not None and not low == high == serves:
        raise MissingRouting(
            f"task {serves} is merged into the weights, got task_ids between {low} and {high}: "
            "call unmerge() to serve other tasks"
        )


def checked_masks(mask: Any) -> dict[Any, Any]:
    """What `route(mask=...)` was given, by stream.

    Raises:
        MissingRouting: it is neither a mask nor masks by stream.
    """
    given = mask if isinstance(mask, Mapping) else {"encoder": mask}
    masks = {stream: mask_of(value) for stream, value in given.items()}
    if any(value is None for value in masks.values()) or not set(masks) <= {"encoder", "decoder"}:
        raise MissingRouting(
            "mask must be a tensor (rows, positions), 1 on real tokens, or a dictionary of them by 'encoder' and "
            f"'decoder', got {type(mask).__name__} {list(given)}"
        )
    return masks
