"""Fitted heads in the results folder: its cells start from the same numbers, whenever and wherever they run.

    <root>/heads/<hash of all that a fit depends on>.safetensors

A second fit of the same rows, on another processor, differs from the first in its last digits. A fit takes minutes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from benchmarks.backbones.load import BackboneSource
from benchmarks.cells.data import TokenisedTask
from benchmarks.cells.heads import FOLDS, ITERATIONS, STRENGTHS, Floats, Head, fit_heads, rows_of_fit
from benchmarks.families import AnyFamily
from benchmarks.protocols.protocol import Protocol
from benchmarks.records.store import RecordError, replacing

FORMAT = 1
"""To be raised where `benchmarks.cells.heads` fits other heads to the same rows."""


def stored_heads(
    root: Path, tasks: Sequence[TokenisedTask], family: AnyFamily, source: BackboneSource, device: torch.device
) -> dict[str, Head]:
    """The heads of all tasks as the folder `root` has them; fitted and written there if the folder has none.

    Raises:
        RecordError: the file is damaged.
    """
    path = root / "heads" / f"{_key(tasks, family.protocol, source)}.safetensors"
    if not path.exists():
        heads = fit_heads(tasks, family, source, device)
        if not path.exists():  # another shard may have been faster: all start from the same file
            _write(path, heads)
    return _read(path, [task.spec.name for task in tasks])


def _key(tasks: Sequence[TokenisedTask], protocol: Protocol, source: BackboneSource) -> str:
    """What features and fits depend on: the backbone and what heads read of it, the rows, the rule of the fit."""
    rule = [FORMAT, source.identity, protocol.pooling, STRENGTHS, FOLDS, ITERATIONS]
    rule += [] if protocol.base_dtype == "fp32" else [protocol.base_dtype]
    digest = hashlib.sha256(json.dumps(rule).encode())
    for task in tasks:
        spec = task.spec
        digest.update(json.dumps([spec.name, spec.kind, len(spec.labels), spec.label_range]).encode())
        for row in rows_of_fit(task, protocol):
            digest.update(json.dumps([row.label, row.sequences, row.segments]).encode())
    return digest.hexdigest()[:16]


def _write(path: Path, heads: Mapping[str, Head]) -> None:
    tensors: dict[str, Floats] = {}
    for name, head in heads.items():
        tensors |= {f"{name}.weight": head.weight, f"{name}.bias": head.bias}
    with replacing(path) as file:
        file.write(save(tensors))


def _read(path: Path, names: Sequence[str]) -> dict[str, Head]:
    try:
        tensors = load_file(path)
        return {name: Head(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names}
    except (SafetensorError, KeyError) as error:
        raise RecordError(
            f"{path} is damaged ({error}); delete the file, and the next run fits the heads again"
        ) from error
