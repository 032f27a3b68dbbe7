"""Encoder with heads: the last hidden states, pooled over the tokens, read by one linear head per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.backbones.load import BackboneSource, hidden_size, load_backbone
from benchmarks.families.base import Answers, Family, Model, require_numbers
from benchmarks.families.batch import HeadBatch, HeadRow, TaskGroup, Tokens, padded
from benchmarks.families.prompts import task_title
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Pooling
from benchmarks.protocols.seeds import torch_stream
from benchmarks.tasks.base import Example, TaskSpec


@dataclass(frozen=True)
class Encoder(Family[HeadRow, HeadBatch]):
    """The family of encoders: heads read the pooled last hidden states."""

    has_heads = True

    def encode(self, spec: TaskSpec, indices: Sequence[int], examples: Sequence[Example]) -> tuple[HeadRow, ...]:
        """Rows of one text, of a pair of texts, or of one pair per choice."""
        texts = [texts_of(spec, example) for example in examples]
        prefix = f"{task_title(spec)}: " if self.protocol.task_prefix else ""
        ids, segments = self._tokenise(spec, [(f"{prefix}{first}", second) for row in texts for first, second in row])
        rows, start = [], 0
        for index, example, row in zip(indices, examples, texts, strict=True):
            span = slice(start, start := start + len(row))
            rows.append(
                HeadRow(
                    sequences=tuple(map(tuple, ids[span])),
                    segments=None if segments is None else tuple(map(tuple, segments[span])),
                    label=float(example.label),
                    index=index,
                )
            )
        return tuple(rows)

    def _tokenise(
        self, spec: TaskSpec, texts: Sequence[tuple[str, str | None]]
    ) -> tuple[list[list[int]], list[list[int]] | None]:
        """Token ids and, if the tokenizer has them, token types of single texts or of pairs."""
        seconds = [second for _, second in texts]
        paired = [second is not None for second in seconds]
        if any(paired) and not all(paired):
            raise ValueError(
                f"task {spec.name}: {paired.count(False)} of {len(paired)} rows lack the second text of a pair"
            )
        encoded = self.tokenizer(
            [first for first, _ in texts],
            seconds if any(paired) else None,
            truncation=spec.truncate if any(paired) else True,
            max_length=self.protocol.max_length,
        )
        return encoded["input_ids"], encoded.get("token_type_ids")

    def training_batch(self, rows: Sequence[tuple[int, HeadRow]]) -> HeadBatch:
        """Pad rows, given with the position of their task, into one batch."""
        return collate(rows, self.specs, self.tokenizer.pad_token_id)

    def scoring_batch(self, rows: Sequence[tuple[int, HeadRow]]) -> HeadBatch:
        """The same: the heads answer all at once."""
        return self.training_batch(rows)

    def timing_row(self, tokens: Tokens) -> HeadRow:
        """A row of these tokens.

        A multiple-choice row has a single choice here: only so do rows and sequences agree for every list of tasks.
        Its loss is zero, its cost is that of any other sequence.
        """
        segments = ((0,) * len(tokens),) if "token_type_ids" in self.tokenizer.model_input_names else None
        return HeadRow(sequences=(tokens,), segments=segments, label=0.0, index=0)

    def load(self, source: BackboneSource, seed: int) -> MultiTaskModel:
        """The frozen encoder with fresh heads."""
        protocol = self.protocol
        encoder = load_backbone(source, "encoder", dropout=protocol.dropout, dtype=protocol.base_dtype)
        names = (protocol.name, seed, "heads")
        return MultiTaskModel(
            encoder,
            self.specs,
            hidden=hidden_size(encoder),
            stream=names,
            pooling=protocol.pooling,
            shared=protocol.heads == "shared",
        )


class MultiTaskModel(Model[HeadBatch]):
    """Pooled hidden states of the backbone, read by one linear head per task.

    Adapters go onto `backbone`; the heads and their initial values are the same for all methods.
    """

    def __init__(
        self,
        encoder: nn.Module,
        specs: Sequence[TaskSpec],
        *,
        hidden: int,
        stream: Sequence[str | int],
        pooling: Pooling = "mean",
        shared: bool = False,
    ) -> None:
        """Build the heads.

        Args:
            encoder: becomes the backbone.
            specs: the tasks, in the order of the protocol.
            hidden: width of the backbone's last hidden states.
            stream: names of the random stream of the heads.
            pooling: how the states of a sequence become one.
            shared: whether one head reads all tasks.

        Raises:
            UsageError: the tasks of a shared head do not have the same number of classes.
        """
        super().__init__(encoder, specs)
        self.pooling: Pooling = pooling
        self.shared = shared
        if shared and len({(spec.kind, len(spec.labels)) for spec in specs}) > 1:
            raise UsageError(
                'heads = "shared" needs tasks of one kind with equally many classes, got '
                + ", ".join(f"{spec.name} ({spec.kind}, {len(spec.labels)})" for spec in specs)
            )
        for spec in specs[:1] if shared else specs:
            # One stream per task: a head starts equally whatever other tasks are in the protocol.
            with torch_stream(*stream, spec.name):
                self.heads[spec.name] = nn.Linear(hidden, head_width(spec))

    def forward(self, batch: HeadBatch) -> list[Tensor]:
        """Logits of every group of the batch, in the order of `batch.groups`."""
        pooled = self.pool(batch)
        with torch.autocast(pooled.device.type, enabled=False):
            return [self._logits(pooled, group) for group in batch.groups]

    def pool(self, batch: HeadBatch) -> Tensor:
        """What the heads read of every sequence: (sequences, width)."""
        hidden = self.call(**batch.inputs, **self.routing(batch.task_ids)).last_hidden_state
        # Pooling and heads in single precision: they are cheap, and scores are compared at their last digits.
        with torch.autocast(hidden.device.type, enabled=False):
            return pool(hidden.float(), batch.inputs["attention_mask"], self.pooling)

    def _logits(self, pooled: Tensor, group: TaskGroup) -> Tensor:
        spec = self.specs[group.task]
        logits: Tensor = self.heads[self.specs[0].name if self.shared else spec.name](pooled[group.sequences])
        if spec.kind == "classification":
            return logits
        logits = logits.squeeze(-1)
        if group.valid is None:
            return logits
        return logits.masked_fill(~group.valid, torch.finfo(logits.dtype).min)

    def loss(self, logits: Sequence[Tensor], batch: HeadBatch) -> Tensor:
        """Mean over the rows of the batch.

        Cross-entropy over classes or over a row's choices; for regression the binary cross-entropy with the
        scaled score as a soft target: least where the prediction equals the score, and of comparable size.
        """
        total = torch.zeros((), device=batch.task_ids.device)
        for group, values in zip(batch.groups, logits, strict=True):
            if self.specs[group.task].kind == "regression":
                total = total + F.binary_cross_entropy_with_logits(values, group.labels, reduction="sum")
            else:
                total = total + F.cross_entropy(values, group.labels, reduction="sum")
        return total / batch.rows

    def predict(self, batch: HeadBatch) -> Answers:
        """Class, choice or score (in the task's own range) of every row of a batch of one task."""
        (logits,) = self(batch)
        return self.read(logits, batch.groups[0])

    def read(self, logits: Tensor, group: TaskGroup) -> Answers:
        """The answers that the logits of a group give."""
        spec = self.specs[group.task]
        require_numbers(logits, spec)
        if spec.kind != "regression":
            return Answers(logits.argmax(-1), logits.log_softmax(-1))
        low, high = spec.score_range
        return Answers(low + (high - low) * logits.sigmoid())


def head_width(spec: TaskSpec) -> int:
    """Outputs of a task's head: one per class, or one score per sequence."""
    return len(spec.labels) if spec.kind == "classification" else 1


def pool(hidden: Tensor, mask: Tensor, how: Pooling = "mean") -> Tensor:
    """One state per row, of the real tokens: (rows, tokens, width) -> (rows, width).

    Encoders of the BERT family hold a sentence in the first token, decoder-only models in the last.
    """
    if how != "mean":
        at = mask.argmax(1) if how == "first" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), at]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


# ---------------------------------------------------------------------- rows and batches


def texts_of(spec: TaskSpec, example: Example) -> list[tuple[str, str | None]]:
    """The text, or the pair of texts, of every sequence an example becomes."""
    if spec.kind != "multiple_choice":
        return [(example.first, example.second)]
    if not example.choices:
        raise ValueError(f"task {spec.name}: a multiple-choice row without choices: {example.first!r}")
    stem = example.first if example.second is None else f"{example.second} {example.first}"
    return [(stem, choice) for choice in example.choices]


def collate(rows: Sequence[tuple[int, HeadRow]], specs: Sequence[TaskSpec], pad_token_id: int) -> HeadBatch:
    """Pad rows, given with the position of their task, into one batch."""
    ids, mask = padded([ids for _, row in rows for ids in row.sequences], pad_token_id)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if rows[0][1].segments is not None:
        inputs["token_type_ids"], _ = padded([types for _, row in rows for types in row.segments or ()], 0)
    return HeadBatch(
        inputs=inputs,
        task_ids=torch.tensor([task for task, row in rows for _ in row.sequences]),
        groups=_groups(rows, specs),
        rows=len(rows),
        tokens=int(mask.sum()),
        padded_tokens=ids.numel(),
    )


def _groups(rows: Sequence[tuple[int, HeadRow]], specs: Sequence[TaskSpec]) -> tuple[TaskGroup, ...]:
    starts = np.cumsum([0, *(len(row.sequences) for _, row in rows)])
    groups = []
    for task in sorted({task for task, _ in rows}):
        members = [(int(starts[at]), row) for at, (owner, row) in enumerate(rows) if owner == task]
        labels = torch.tensor([row.label for _, row in members])
        if specs[task].kind == "regression":
            low, high = specs[task].score_range
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
        groups.append(TaskGroup(task=task, sequences=positions, valid=valid, labels=labels))
    return tuple(groups)
