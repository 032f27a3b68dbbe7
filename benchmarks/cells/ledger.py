"""The account of what a run has consumed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from benchmarks.families.batch import Batch, Row
from benchmarks.records.schema import Budget


class Ledger:
    """What a run has consumed, and a hash two runs share only if they saw the same rows in the same order."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._hash = hashlib.sha256()
        self._rows = dict.fromkeys(self._names, 0)
        self._steps = self._sequences = self._tokens = self._padded_tokens = 0
        self.optimiser: str | None = None
        """What the optimiser did, as it says after the last step."""

    def add(self, rows: Sequence[tuple[int, Row]], batch: Batch) -> None:
        """Enter one training batch."""
        for task, row in rows:
            name = self._names[task]
            self._rows[name] += 1
            self._hash.update(f"{name}\0{row.label!r}\0".encode())
            for ids in row.trained_on:
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
            optimiser=self.optimiser,
        )
