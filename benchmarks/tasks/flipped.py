"""Tasks that contradict another one: the same texts with the other label, which no text alone tells apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .base import Example, TaskData, TaskSpec
from .loading import fingerprint

ENDING = "_flipped"


def flip_spec(spec: TaskSpec) -> TaskSpec:
    """The task of the same texts whose label is the other one.

    Raises:
        ValueError: the task does not have two classes.
    """
    if spec.kind != "classification" or len(spec.labels) != 2:
        raise ValueError(f"task {spec.name}: only a task of two classes has an opposite one")
    return dataclasses.replace(spec, name=f"{spec.name}{ENDING}")


def flip(data: TaskData) -> TaskData:
    """The rows of a task of two classes, with the other label each."""
    train, validation = _flip_rows(data.train), _flip_rows(data.validation)
    return dataclasses.replace(
        data,
        spec=flip_spec(data.spec),
        train=train,
        validation=validation,
        source=f"{data.source}; labels flipped",
        fingerprint=fingerprint(train, validation),
    )


def _flip_rows(rows: Sequence[Example]) -> tuple[Example, ...]:
    return tuple(dataclasses.replace(row, label=1 - int(row.label)) for row in rows)
