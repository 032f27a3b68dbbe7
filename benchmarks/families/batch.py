"""Rows and batches: what the families of models make of a task's examples.

Where heads answer, a row is one or several token sequences (`HeadRow`, `HeadBatch`). Where the answer is text, a row
is a prompt and its candidate answers (`TextRow`, `TextBatch`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

# Lengths in steps of eight suit the matrix kernels and keep the number of distinct shapes small.
LENGTH_MULTIPLE = 8

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Row(ABC):
    """One tokenised example.

    Attributes:
        label: class index, index of the right choice, or score.
        index: position among all rows of the split.
    """

    label: float
    index: int

    @property
    @abstractmethod
    def trained_on(self) -> tuple[Tokens, ...]:
        """The token sequences that training reads."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of the longest sequence, and of the answer that is trained on."""

    @property
    @abstractmethod
    def choices(self) -> int:
        """Candidates that the row has of its own; those of a class label are its task's."""


@dataclass(frozen=True, kw_only=True)
class HeadRow(Row):
    """A row that a head reads.

    Attributes:
        sequences: token ids; one sequence, or one per choice of a multiple-choice row.
        segments: token types of the same shape; None for backbones that have none.
    """

    sequences: tuple[Tokens, ...]
    segments: tuple[Tokens, ...] | None

    @property
    def trained_on(self) -> tuple[Tokens, ...]:
        """All sequences."""
        return self.sequences

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))

    @property
    def choices(self) -> int:
        """One sequence for each."""
        return len(self.sequences)


@dataclass(frozen=True, kw_only=True)
class TextRow(Row):
    """A row whose answer is text.

    Attributes:
        prompt: token ids.
        answers: token ids of every candidate answer, each with its end.
        gold: which of them is right.
    """

    prompt: Tokens
    answers: tuple[Tokens, ...]
    gold: int

    @property
    def right_answer(self) -> Tokens:
        """The answer that is trained on."""
        return self.answers[self.gold]

    @property
    def trained_on(self) -> tuple[Tokens, ...]:
        """The prompt and its right answer."""
        return self.prompt, self.right_answer

    @property
    def length(self) -> int:
        """Tokens of the prompt and of its right answer."""
        return len(self.prompt) + len(self.right_answer)

    @property
    def choices(self) -> int:
        """One answer for each."""
        return len(self.answers)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Padded sequences of one or several tasks.

    Attributes:
        inputs: what the backbone takes: `input_ids`, `attention_mask` and, if it has them, `token_type_ids`.
        task_ids: the task of every sequence.
        rows: examples; a multiple-choice row counts once.
        tokens: tokens without padding, those of text answers among them.
        padded_tokens: the same with padding.
    """

    inputs: dict[str, Tensor]
    task_ids: Tensor
    rows: int
    tokens: int
    padded_tokens: int

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with `function` of every tensor."""
        inputs = {name: function(value) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, task_ids=function(self.task_ids))

    def staged(self, device: torch.device) -> Self:
        """The same in memory from which `device` copies while the host goes on."""
        return self.map(Tensor.pin_memory) if device.type == "cuda" else self

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return self.map(lambda tensor: move(tensor, device))


@dataclass(frozen=True, kw_only=True)
class TaskGroup:
    """The rows of one task within a batch that heads read.

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

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with `function` of every tensor."""
        valid = None if self.valid is None else function(self.valid)
        return replace(self, sequences=function(self.sequences), labels=function(self.labels), valid=valid)


@dataclass(frozen=True, kw_only=True)
class HeadBatch(Batch):
    """Sequences that heads read.

    Attributes:
        groups: the rows, task by task.
    """

    groups: tuple[TaskGroup, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with `function` of every tensor."""
        return replace(super().map(function), groups=tuple(group.map(function) for group in self.groups))


@dataclass(frozen=True, kw_only=True)
class TextBatch(Batch):
    """Prompts and candidate answers.

    Attributes:
        labels: token ids of the candidates, -100 where there is none; in the layout of the family that made them.
        valid: which candidates exist, shape (rows, candidates).
        tasks: position of every row's task in the protocol; on the host, which need not wait to ask.
        prompts: which positions of the inputs are of prompts; None where answers stand apart.
    """

    labels: Tensor
    valid: Tensor
    tasks: tuple[int, ...]
    prompts: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with `function` of every tensor."""
        prompts = None if self.prompts is None else function(self.prompts)
        return replace(super().map(function), labels=function(self.labels), valid=function(self.valid), prompts=prompts)


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; on its way to a GPU from pinned memory, so that the host goes on meanwhile."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(device, non_blocking=True)
    return tensor.to(device)


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
