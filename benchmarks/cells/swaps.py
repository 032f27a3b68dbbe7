"""What a trained method scores when it is told the wrong task: whether its routing matters at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.cells.data import TokenisedTask
from benchmarks.cells.evaluate import evaluate_model
from benchmarks.families import AnyFamily, AnyModel
from benchmarks.records.failures import Diverged
from benchmarks.records.schema import Swapped
from moepeft import Attachment

ROWS = 64
"""Reported rows per task that are scored under every id."""


def swap_ids(model: AnyModel, tasks: Sequence[TokenisedTask], family: AnyFamily, *, autocast: bool) -> Swapped | None:
    """Skills of the first `ROWS` reported rows of every task under the id of every task.

    None of methods that are not routed by ids, and of answers without probabilities. None as well where a wrong id
    gives numbers that are not finite: a run that is sound under its own ids has not failed.

    Args:
        model: with its adapters and the weights that are scored.
        tasks: in the order of the protocol, which is that of the ids.
        family: of the model.
        autocast: whether the forward runs in bfloat16.
    """
    attachment = model.attachment
    if not isinstance(attachment, Attachment) or attachment.factory.capabilities.routing != "task" or len(tasks) < 2:
        return None
    few = [replace(task, validation=task.validation[:ROWS]) for task in tasks]
    columns: list[list[float]] = []
    for told in range(len(tasks)):
        try:
            scores = evaluate_model(
                model, few, family, batch_size=family.protocol.eval_batch_size, autocast=autocast, told=told
            ).scores
        except Diverged:
            return None
        known = [score.likelihood for score in scores.values()]
        if any(one is None for one in known):
            return None
        columns.append([round(one.skill, 6) for one in known if one is not None])
    return Swapped(
        tasks=[task.spec.name for task in tasks],
        rows={task.spec.name: len(task.validation) for task in few},
        skills=[list(row) for row in zip(*columns, strict=True)],
    )
