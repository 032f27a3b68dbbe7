"""One backbone, one small head per task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data import Batch, TaskGroup, label_range
from benchmarks.seeds import torch_stream
from benchmarks.tasks.base import TaskSpec


class MultiTaskModel(nn.Module):
    """Mean-pooled hidden states of the backbone, read by one linear head per task.

    Adapters go onto `encoder`; the heads and their initial values are the same for all methods.

    Attributes:
        encoder: the backbone.
        heads: by task name.
        passes_task_ids: whether `encoder` understands ``task_ids=``, as it does once adapters are attached.
    """

    def __init__(
        self, encoder: nn.Module, specs: Sequence[TaskSpec], *, hidden: int, stream: Sequence[str | int]
    ) -> None:
        """Build the heads.

        Args:
            encoder: the backbone.
            specs: the tasks, in the order of the protocol.
            hidden: width of the backbone's last hidden states.
            stream: names of the random stream of the heads.
        """
        super().__init__()
        self.encoder = encoder
        self.specs = tuple(specs)
        self.passes_task_ids = False
        self.heads = nn.ModuleDict()
        for spec in specs:
            # One stream per task: a head starts equally whatever other tasks are in the protocol.
            with torch_stream(*stream, spec.name):
                self.heads[spec.name] = nn.Linear(hidden, head_width(spec))

    def forward(self, batch: Batch) -> list[Tensor]:
        """Logits of every group of the batch, in the order of `batch.groups`."""
        routing = {"task_ids": batch.task_ids} if self.passes_task_ids else {}
        hidden = self.encoder(**batch.inputs, **routing).last_hidden_state
        # Pooling and heads in single precision: they are cheap, and scores are compared at their last digits.
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = mean_pool(hidden.float(), batch.inputs["attention_mask"])
            return [self._logits(pooled, group) for group in batch.groups]

    def _logits(self, pooled: Tensor, group: TaskGroup) -> Tensor:
        spec = self.specs[group.task]
        logits: Tensor = self.heads[spec.name](pooled[group.sequences])
        if spec.kind == "classification":
            return logits
        logits = logits.squeeze(-1)
        if group.valid is None:
            return logits
        return logits.masked_fill(~group.valid, torch.finfo(logits.dtype).min)

    def loss(self, logits: Sequence[Tensor], batch: Batch) -> Tensor:
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

    def predict(self, logits: Tensor, group: TaskGroup) -> Tensor:
        """Class, choice or score (in the task's own range) of every row of a group."""
        spec = self.specs[group.task]
        if spec.kind != "regression":
            return logits.argmax(-1)
        low, high = label_range(spec)
        return low + (high - low) * logits.sigmoid()


def head_width(spec: TaskSpec) -> int:
    """Outputs of a task's head: one per class, or one score per sequence."""
    return len(spec.labels) if spec.kind == "classification" else 1


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the hidden states over the real tokens: (rows, tokens, width) -> (rows, width)."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
