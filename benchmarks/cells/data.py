"""From the rows of a task to those that a protocol uses, tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.families import AnyFamily
from benchmarks.families.batch import Row
from benchmarks.protocols.protocol import Protocol
from benchmarks.protocols.seeds import generator
from benchmarks.tasks.base import Example, Split, TaskData, TaskSpec


@dataclass(frozen=True, slots=True)
class TokenisedTask:
    """One task, ready for batching.

    Attributes:
        spec: the task.
        train: rows to train on.
        validation: rows to score.
        source: where the rows come from.
    """

    spec: TaskSpec
    train: Sequence[Row]
    validation: Sequence[Row]
    source: str = ""

    def candidates(self, row: Row) -> int:
        """Between how many classes or choices a row decides."""
        return row.choices if self.spec.kind == "multiple_choice" else len(self.spec.labels)


def tokenise_task(data: TaskData, family: AnyFamily) -> TokenisedTask:
    """Tokenise the rows that the protocol uses of one task; every method and seed gets the same ones."""
    train, validation = (
        family.encode(data.spec, *chosen_rows(data, split, family.protocol)) for split in ("train", "validation")
    )
    return TokenisedTask(data.spec, train, validation, data.source)


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
    limit = protocol.eval_rows
    if split == "train":
        is_scarce = protocol.scarce_rows is not None and data.spec.name in protocol.endpoint_tasks
        limit = protocol.scarce_rows if is_scarce else protocol.train_rows
    if limit is not None and limit < len(indices):
        kept = generator("subset", split, data.spec.name).permutation(len(indices))[:limit]
        indices = [indices[at] for at in sorted(map(int, kept))]
    return indices, [rows[index] for index in indices]
