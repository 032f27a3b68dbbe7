"""Score a model, or a constant guess, on the reported rows, and keep what was predicted for every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas as pd
import torch

from benchmarks.cells.data import TokenisedTask
from benchmarks.families import UNREADABLE, AnyFamily, AnyModel
from benchmarks.records.schema import Score
from benchmarks.tasks.metrics import score


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores by task, and one line per reported row (task, index, label, prediction, correct)."""

    scores: dict[str, Score]
    outcomes: pd.DataFrame


def evaluate_model(
    model: AnyModel, tasks: Sequence[TokenisedTask], family: AnyFamily, *, batch_size: int, autocast: bool
) -> Evaluation:
    """Score all tasks. Batches hold rows of one task, sorted by length: the same batches for every method.

    A generated answer that cannot be read counts as a wrong one, a score that cannot be read as the mean score of the
    training rows; the note of the task's score says how many there were.

    Raises:
        Diverged: what an answer is chosen by is not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    predictions = []
    for position, task in enumerate(tasks):
        order = sorted(range(len(task.validation)), key=lambda row, task=task: (task.validation[row].length, row))  # type: ignore[misc]
        found = torch.empty(len(order), dtype=torch.float64)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = [(position, task.validation[row]) for row in chosen]
            batch = family.scoring_batch(rows).to(device)
            with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                found[chosen] = model.predict(batch).double().cpu()
        predictions.append(found.tolist())
    return _evaluation(tasks, predictions)


def evaluate_majority(tasks: Sequence[TokenisedTask]) -> Evaluation:
    """Score the best constant guess from the training labels.

    The most frequent class or choice (the lowest one where several are), or the mean score. A row that has fewer
    choices than the guess counts as wrong.
    """
    predictions = []
    for task in tasks:
        labels = [row.label for row in task.train]
        if task.spec.kind == "regression":
            guess = fmean(labels)
        else:
            counts = Counter(labels)
            guess = min(counts, key=lambda label: (-counts[label], label))
        predictions.append([guess] * len(task.validation))
    return _evaluation(tasks, predictions)


def _evaluation(tasks: Sequence[TokenisedTask], predictions: Sequence[Sequence[float]]) -> Evaluation:
    scores, frames = {}, []
    for task, answers in zip(tasks, predictions, strict=True):
        regression = task.spec.kind == "regression"
        labels = [row.label for row in task.validation]
        found, remark = _readable(task, answers)
        result = (
            score(task.spec.metric, found, labels)
            if regression
            else score(task.spec.metric, list(map(int, found)), list(map(int, labels)))
        )
        scores[task.spec.name] = Score(
            metrics=dict(result.values),
            primary=result.primary,
            rows=len(labels),
            note="; ".join(filter(None, (result.note, remark))) or None,
        )
        frames.append(
            pd.DataFrame(
                {
                    "task": task.spec.name,
                    "index": [row.index for row in task.validation],
                    "label": labels,
                    "prediction": found,
                    # Neither right nor wrong: regression is compared through its predictions.
                    "correct": [
                        float("nan") if regression else float(a == b) for a, b in zip(found, labels, strict=True)
                    ],
                }
            )
        )
    return Evaluation(scores, pd.concat(frames, ignore_index=True))


def _readable(task: TokenisedTask, answers: Sequence[float]) -> tuple[list[float], str | None]:
    """The answers with something wrong in place of those that could not be read, and how many these were."""
    unread = [answer == UNREADABLE for answer in answers]
    if not any(unread):
        return list(answers), None
    if task.spec.kind == "regression":
        instead = [fmean(row.label for row in task.train)] * len(answers)
    else:
        instead = [float(row.label == 0) for row in task.validation]  # a class or a choice that is not the right one
    found = [other if bad else answer for answer, other, bad in zip(answers, instead, unread, strict=True)]
    return found, f"{sum(unread)} of {len(answers)} generated answers cannot be read"
