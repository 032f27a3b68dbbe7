"""From examples to batches: tokenise once, fix the order, pad, and keep account of what was consumed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from benchmarks.protocol import Protocol
from benchmarks.records import Budget
from benchmarks.seeds import generator
from benchmarks.tasks.base import Example, Split, TaskData, TaskSpec

# Lengths in steps of eight suit the matrix kernels and keep the number of distinct shapes small.
LENGTH_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenised example.

    Attributes:
        sequences: token ids; one sequence, or one per choice of a multiple-choice row.
        segments: token types of the same shape; None for backbones that have none.
        label: class index, index of the right choice, or score.
        index: position among all rows of the split.
    """

    sequences: tuple[tuple[int, ...], ...]
    segments: tuple[tuple[int, ...], ...] | None
    label: float
    index: int

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))


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
        valid = None if self.valid is None else self.valid.to(device)
        return replace(self, sequences=self.sequences.to(device), labels=self.labels.to(device), valid=valid)


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded sequences of one or several tasks.

    Attributes:
        inputs: what the backbone takes: `input_ids`, `attention_mask` and, if it has them, `token_type_ids`.
        task_ids: the task of every sequence.
        groups: the rows, task by task.
        rows: examples; a multiple-choice row counts once.
        tokens: tokens without padding.
    """

    inputs: dict[str, Tensor]
    task_ids: Tensor
    groups: tuple[TaskGroup, ...]
    rows: int
    tokens: int

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(
            self,
            inputs={name: value.to(device) for name, value in self.inputs.items()},
            task_ids=self.task_ids.to(device),
            groups=tuple(group.to(device) for group in self.groups),
        )


# ---------------------------------------------------------------------- tokenising


def tokenise_task(data: TaskData, tokenizer: Any, protocol: Protocol) -> TokenisedTask:
    """Tokenise the rows that the protocol uses of one task; every method and seed gets the same ones."""
    return TokenisedTask(
        spec=data.spec,
        train=_tokenise(data.spec, *chosen_rows(data, "train", protocol), tokenizer, protocol.max_length),
        validation=_tokenise(data.spec, *chosen_rows(data, "validation", protocol), tokenizer, protocol.max_length),
    )


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


def _tokenise(
    spec: TaskSpec, indices: Sequence[int], examples: Sequence[Example], tokenizer: Any, max_length: int
) -> tuple[Row, ...]:
    texts = [texts_of(spec, example) for example in examples]
    firsts = [first for row in texts for first, _ in row]
    seconds = [second for row in texts for _, second in row]
    paired = [second is not None for second in seconds]
    if any(paired) and not all(paired):
        raise ValueError(
            f"task {spec.name}: {paired.count(False)} of {len(paired)} rows lack the second text of a pair"
        )
    encoded = tokenizer(
        firsts,
        seconds if any(paired) else None,
        truncation=spec.truncate if any(paired) else True,
        max_length=max_length,
    )
    ids, segments = encoded["input_ids"], encoded.get("token_type_ids")
    rows = []
    start = 0
    for index, example, row in zip(indices, examples, texts, strict=True):
        span = slice(start, start := start + len(row))
        rows.append(
            Row(
                sequences=tuple(map(tuple, ids[span])),
                segments=None if segments is None else tuple(map(tuple, segments[span])),
                label=float(example.label),
                index=index,
            )
        )
    return tuple(rows)


def texts_of(spec: TaskSpec, example: Example) -> list[tuple[str, str | None]]:
    """The text, or the pair of texts, of every sequence an example becomes."""
    if spec.kind != "multiple_choice":
        return [(example.first, example.second)]
    if not example.choices:
        raise ValueError(f"task {spec.name}: a multiple-choice row without choices: {example.first!r}")
    stem = example.first if example.second is None else f"{example.second} {example.first}"
    return [(stem, choice) for choice in example.choices]


def label_range(spec: TaskSpec) -> tuple[float, float]:
    """Lowest and highest score of a regression task."""
    if spec.label_range is None or spec.label_range[0] >= spec.label_range[1]:
        raise ValueError(f"task {spec.name}: regression needs a label_range such as (0.0, 5.0), got {spec.label_range}")
    return spec.label_range


# ---------------------------------------------------------------------- order


def training_order(
    sizes: dict[str, int], *, steps: int, batch_size: int, stream: Sequence[str | int]
) -> Iterator[list[tuple[int, int]]]:
    """Which rows every step sees, as (task, row) positions.

    Every slot of every batch draws its task with probability 1/T and takes the next row of that task's own
    shuffled stream, which is reshuffled each time it is used up.

    Args:
        sizes: training rows by task name, in the order of the protocol.
        steps: number of batches.
        batch_size: rows per batch.
        stream: names of the random stream; the order depends on nothing else.
    """
    draws = generator(*stream, "tasks")
    rows = [_shuffled_for_ever(size, generator(*stream, "rows", name)) for name, size in sizes.items()]
    for _ in range(steps):
        tasks = draws.integers(len(rows), size=batch_size)
        yield [(int(task), next(rows[task])) for task in tasks]


def sorted_within_windows(
    order: Iterable[list[tuple[int, int]]],
    length: Callable[[tuple[int, int]], int],
    *,
    window: int,
    stream: Sequence[str | int],
) -> Iterator[list[tuple[int, int]]]:
    """The same rows, those of `window` consecutive steps sorted by length and cut into steps again, in random order.

    A batch is padded to its longest row: of an unsorted mixed batch two thirds can be padding.

    Args:
        order: steps of (task, row) positions.
        length: of a row, in tokens.
        window: number of steps sorted together.
        stream: names of the random stream that orders the steps of a window.
    """
    rng = generator(*stream, "windows")
    steps = iter(order)
    while group := list(itertools.islice(steps, window)):
        rows = sorted((row for step in group for row in step), key=length)
        ends = list(itertools.accumulate(map(len, group), initial=0))
        for at in rng.permutation(len(group)):
            yield rows[ends[at] : ends[at + 1]]


def _shuffled_for_ever(size: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from map(int, rng.permutation(size))


# ---------------------------------------------------------------------- batching


def collate(rows: Sequence[tuple[int, Row]], specs: Sequence[TaskSpec], pad_token_id: int) -> Batch:
    """Pad rows, given with the position of their task, into one batch."""
    sequences = [ids for _, row in rows for ids in row.sequences]
    longest = max(map(len, sequences))
    padded_length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    shape = (len(sequences), padded_length)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    for position, ids in enumerate(sequences):
        input_ids[position, : len(ids)] = ids
        mask[position, : len(ids)] = 1
    inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}
    if rows[0][1].segments is not None:
        types = np.zeros(shape, dtype=np.int64)
        for position, segment in enumerate(segment for _, row in rows for segment in row.segments or ()):
            types[position, : len(segment)] = segment
        inputs["token_type_ids"] = torch.from_numpy(types)
    task_ids = [task for task, row in rows for _ in row.sequences]
    return Batch(inputs, torch.tensor(task_ids), _groups(rows, specs), len(rows), int(mask.sum()))


def _groups(rows: Sequence[tuple[int, Row]], specs: Sequence[TaskSpec]) -> tuple[TaskGroup, ...]:
    starts = np.cumsum([0, *(len(row.sequences) for _, row in rows)])
    groups = []
    for task in sorted({task for task, _ in rows}):
        members = [(int(starts[at]), row) for at, (owner, row) in enumerate(rows) if owner == task]
        labels = torch.tensor([row.label for _, row in members])
        if specs[task].kind == "regression":
            low, high = label_range(specs[task])
            labels = (labels - low) / (high - low)
        else:
            labels = labels.long()
        positions = torch.tensor([start for start, _ in members])
        valid = None
        if specs[task].kind == "multiple_choice":
            counts = torch.tensor([len(row.sequences) for _, row in members])
            offsets = torch.arange(int(counts.max()))
            valid = offsets < counts[:, None]
            # Choices a row lacks point at its first one and are masked out of the softmax.
            positions = positions[:, None] + offsets * valid
        groups.append(TaskGroup(task, positions, valid, labels))
    return tuple(groups)


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
            for ids in row.sequences:
                self._hash.update(np.asarray([len(ids), *ids], dtype="<i4").tobytes())
        self._steps += 1
        self._sequences += len(batch.task_ids)
        self._tokens += batch.tokens
        self._padded_tokens += batch.inputs["input_ids"].numel()

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
