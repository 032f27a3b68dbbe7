"""Rows and batches: what every family of models makes of a task's examples, and the account of what was consumed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from benchmarks.protocols.protocol import Protocol
from benchmarks.protocols.seeds import generator
from benchmarks.records.schema import Budget
from benchmarks.tasks.base import Example, Split, TaskData, TaskSpec

# Lengths in steps of eight suit the matrix kernels and keep the number of distinct shapes small.
LENGTH_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenised example.

    Attributes:
        sequences: token ids; one sequence, or one per choice of a multiple-choice row that heads read.
        segments: token types of the same shape; None for backbones that have none.
        label: class index, index of the right choice, or score.
        index: position among all rows of the split.
        answers: token ids of every candidate answer, each with its end; empty where heads answer.
        gold: which of them is right.
    """

    sequences: tuple[tuple[int, ...], ...]
    segments: tuple[tuple[int, ...], ...] | None
    label: float
    index: int
    answers: tuple[tuple[int, ...], ...] = ()
    gold: int = 0

    @property
    def length(self) -> int:
        """Tokens of the longest sequence, and of the answer that is trained on."""
        return max(map(len, self.sequences)) + sum(map(len, self.right_answer))

    @property
    def right_answer(self) -> tuple[tuple[int, ...], ...]:
        """The answer that is trained on, as the only element; empty where heads answer."""
        return self.answers[self.gold : self.gold + 1]


@dataclass(frozen=True, slots=True)
class TokenisedTask:
    """One task, ready for batching."""

    spec: TaskSpec
    train: tuple[Row, ...]
    validation: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class TaskGroup:
    """The rows of one task within a batch.

    Attributes:
        task: position of the task in the protocol.
        sequences: where the rows stand in the batch: shape (rows,), or (rows, choices) for multiple choice.
        valid: which choices exist, shape (rows, choices); None for the other kinds.
        labels: integer targets; for regression the scores, scaled to [0, 1].
    """

    task: int
    sequences: Tensor
    valid: Tensor | None
    labels: Tensor

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        valid = None if self.valid is None else move(self.valid, device)
        return replace(self, sequences=move(self.sequences, device), labels=move(self.labels, device), valid=valid)


@dataclass(frozen=True, slots=True)
class Answers:
    """Candidate answers of a batch's rows, as text.

    Attributes:
        labels: token ids, -100 where there is none; in the layout of the family that made them.
        valid: which candidates exist, shape (rows, candidates).
        task: position of the rows' task in the protocol where it is one for all, as in scoring; else -1.
    """

    labels: Tensor
    valid: Tensor
    task: int

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(self, labels=move(self.labels, device), valid=move(self.valid, device))


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded sequences of one or several tasks.

    Attributes:
        inputs: what the backbone takes: `input_ids`, `attention_mask` and, if it has them, `token_type_ids`.
        task_ids: the task of every sequence.
        groups: the rows, task by task; empty where answers are text.
        rows: examples; a multiple-choice row counts once.
        tokens: tokens without padding, those of text answers among them.
        padded_tokens: the same with padding.
        answers: the candidates as text; None where heads answer.
    """

    inputs: dict[str, Tensor]
    task_ids: Tensor
    groups: tuple[TaskGroup, ...]
    rows: int
    tokens: int
    padded_tokens: int
    answers: Answers | None = None

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(
            self,
            inputs={name: move(value, device) for name, value in self.inputs.items()},
            task_ids=move(self.task_ids, device),
            groups=tuple(group.to(device) for group in self.groups),
            answers=None if self.answers is None else self.answers.to(device),
        )


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; on its way to a GPU from pinned memory, so that the host goes on meanwhile."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# ---------------------------------------------------------------------- from examples to rows


def tokenise_task(data: TaskData, tokenizer: Any, protocol: Protocol) -> TokenisedTask:
    """Tokenise the rows that the protocol uses of one task; every method and seed gets the same ones."""
    from benchmarks.families import family_of

    family = family_of(protocol)
    train, validation = (
        family.encode(data.spec, *chosen_rows(data, split, protocol), tokenizer, protocol.max_length)
        for split in ("train", "validation")
    )
    return TokenisedTask(spec=data.spec, train=train, validation=validation)


def chosen_rows(data: TaskData, split: Split, protocol: Protocol) -> tuple[list[int], list[Example]]:
    """Positions and examples the protocol uses: all, or a subset that depends on the task's name alone.

    On a fold, rows cut from the training rows stand in for the reported ones, and are not trained on.
    """
    rows = data.train if split == "train" else data.validation
    indices = list(range(len(rows)))
    if protocol.evaluate_on == "fold":
        rows = data.train
        drawn = list(map(int, generator("fold", data.spec.name).permutation(len(rows))))
        cut = max(1, min(protocol.fold_rows, len(rows) // 5))
        indices = sorted(drawn[cut:] if split == "train" else drawn[:cut])
    limit = protocol.train_rows if split == "train" else protocol.eval_rows
    if limit is not None and limit < len(indices):
        kept = generator("subset", split, data.spec.name).permutation(len(indices))[:limit]
        indices = [indices[at] for at in sorted(map(int, kept))]
    return indices, [rows[index] for index in indices]


def label_range(spec: TaskSpec) -> tuple[float, float]:
    """Lowest and highest score of a regression task."""
    if spec.label_range is None or spec.label_range[0] >= spec.label_range[1]:
        raise ValueError(f"task {spec.name}: regression needs a label_range such as (0.0, 5.0), got {spec.label_range}")
    return spec.label_range


def padded(
    sequences: Sequence[Sequence[int]], fill: int, *, multiple: int = LENGTH_MULTIPLE, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Token ids in a rectangle and the mask of the real ones, both of shape (sequences, length).

    Args:
        sequences: of any length.
        fill: stands where there is no token.
        multiple: the length is the next multiple of it.
        side: where the padding goes.
    """
    longest = max(map(len, sequences))
    shape = (len(sequences), -(-longest // multiple) * multiple)
    ids = np.full(shape, fill, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    for position, tokens in enumerate(sequences):
        span = slice(len(tokens)) if side == "right" else slice(shape[1] - len(tokens), None)
        ids[position, span] = tokens
        mask[position, span] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


# ---------------------------------------------------------------------- account


class Ledger:
    """What a run has consumed, and a hash two runs share only if they saw the same rows in the same order."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._hash = hashlib.sha256()
        self._rows = dict.fromkeys(self._names, 0)
        self._steps = self._sequences = self._tokens = self._padded_tokens = 0

    def add(self, rows: Sequence[tuple[int, Row]], batch: Batch) -> None:
        """Enter one training batch."""
        for task, row in rows:
            name = self._names[task]
            self._rows[name] += 1
            self._hash.update(f"{name}\0{row.label!r}\0".encode())
            for ids in (*row.sequences, *row.right_answer):
                self._hash.update(np.asarray([len(ids), *ids], dtype="<i4").tobytes())
        self._steps += 1
        self._sequences += len(batch.task_ids)
        self._tokens += batch.tokens
        self._padded_tokens += batch.padded_tokens

    def budget(self) -> Budget:
        """The account so far."""
        return Budget(
            order_hash=self._hash.hexdigest(),
            steps=self._steps,
            rows=sum(self._rows.values()),
            sequences=self._sequences,
            tokens=self._tokens,
            padded_tokens=self._padded_tokens,
            rows_per_task=dict(self._rows),
        )
