"""Files that somebody else may have written or may be writing: read with suspicion, replaced as a whole."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import AdapterFileError

LARGEST_JSON = 2**26
"""Bytes. A description has some hundred bytes per site; a file beyond this is none, and would fill the memory."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_json(path: Path, *, missing: str) -> dict[str, Any]:
    """The JSON object in a file, its keys unique and its numbers finite.

    Args:
        path: the file.
        missing: what to do if there is none, for the message.

    Raises:
        AdapterFileError: it is missing, no regular file, damaged, or no object.
    """
    try:
        _check_regular(path, missing)
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes, wanted at most {LARGEST_JSON:,}")
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not readable JSON ({error}): it is damaged, save it again") from error
    if not isinstance(found, dict):
        raise AdapterFileError(f"{path} holds a {type(found).__name__}, wanted a JSON object: it is damaged")
    return found


def read_tensors(path: Path, *, missing: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        path: the file.
        missing: what to do if there is none, for the message.

    Raises:
        AdapterFileError: it is missing, no regular file, or not a whole safetensors file.
    """
    try:
        _check_regular(path, missing)
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{path} is not a whole safetensors file ({error}): copy it again, or save pickled weights anew"
        ) from error
    return tensors


def check_values(path: Path, tensors: Mapping[str, Tensor], kinds: Mapping[str, torch.dtype]) -> None:
    """Whether the tensors read from `path` can be copied into tensors of the same names of these dtypes.

    Raises:
        AdapterFileError: a tensor is of another kind of number, or not finite in the type it is copied to.
    """
    for name, value in tensors.items():
        wanted = kinds[name]
        if value.dtype != wanted and not (wanted in _FLOATS and value.dtype in _FLOATS):
            raise AdapterFileError(
                f"{path}: {name!r} holds {value.dtype}, wanted {wanted}: it was not saved by moepeft"
            )
        if wanted in _FLOATS and not torch.isfinite(value.to(wanted)).all():
            raise AdapterFileError(
                f"{path}: {name!r} holds values that are not finite; the training that made it diverged"
            )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a new file that takes the place of `path` when the block ends without an error.

    Its name is its writer's own: processes that save to one folder do not write into each other's files, and a link
    that somebody left there is not followed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a new safetensors file; use it inside `replacing`."""
    plain = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})


def _check_regular(path: Path, missing: str) -> None:
    # Links are followed: the hub's cache consists of them. What must not be opened is a pipe or a device.
    if path.exists() and not path.is_file():
        raise AdapterFileError(f"{path} is not a regular file: {missing}")
    if not path.exists():
        raise AdapterFileError(f"{path} does not exist: {missing}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is not a finite number")
