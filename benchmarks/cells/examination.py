"""Scores of a run on its way: every checkpoint is the end of a shorter run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.cells.data import TokenisedTask
from benchmarks.cells.evaluate import evaluate_model
from benchmarks.cells.train import Trainer
from benchmarks.families import AnyFamily
from benchmarks.protocols.seeds import generator
from benchmarks.records.schema import Checkpoint


class Examiner:
    """Scores the weights of a run on the same rows each time.

    Args:
        trainer: of the run.
        tasks: of the run; at most `Protocol.checkpoint_rows` of their scored rows are used.
        family: of the model.
    """

    def __init__(self, trainer: Trainer, tasks: Sequence[TokenisedTask], family: AnyFamily) -> None:
        self._trainer, self._family = trainer, family
        self._tasks = [_shortened(task, family.protocol.checkpoint_rows) for task in tasks]

    def __call__(self, step: int, seconds: float) -> Checkpoint:
        """Score after `step` steps that took `seconds`."""
        with self._trainer.scored_weights():
            scores = evaluate_model(
                self._trainer.model,
                self._tasks,
                self._family,
                batch_size=self._family.protocol.eval_batch_size,
                autocast=self._trainer.autocast,
            ).scores
        return Checkpoint(
            step=step,
            seconds=seconds,
            rows={name: score.rows for name, score in scores.items()},
            metrics={name: score.counted(score.primary) for name, score in scores.items()},
            skills={name: score.likelihood.skill for name, score in scores.items() if score.likelihood is not None},
        )


def _shortened(task: TokenisedTask, limit: int | None) -> TokenisedTask:
    if limit is None or limit >= len(task.validation):
        return task
    kept = generator("checkpoint", task.spec.name).permutation(len(task.validation))[:limit]
    return dataclasses.replace(task, validation=tuple(task.validation[at] for at in sorted(map(int, kept))))
