"""Score a model, or a constant guess, on the reported rows, and keep what was predicted for every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import pandas as pd
import torch

from benchmarks.cells.data import TokenisedTask
from benchmarks.cells.likelihood import Floats, RowLikelihoods, of_candidates, of_prior, of_scores
from benchmarks.families import UNREADABLE, AnyFamily, AnyModel
from benchmarks.records.schema import Score
from benchmarks.tasks.metrics import score


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores by task, and one line per reported row.

    Its columns are task, index, label, prediction, correct and, of answers with probabilities, log_likelihood,
    prior_log_likelihood and confidence (`benchmarks.cells.likelihood`); NaN where there are none.
    """

    scores: dict[str, Score]
    outcomes: pd.DataFrame


def evaluate_model(
    model: AnyModel,
    tasks: Sequence[TokenisedTask],
    family: AnyFamily,
    *,
    batch_size: int,
    autocast: bool,
    told: int | None = None,
) -> Evaluation:
    """Score all tasks. Batches hold rows of one task, sorted by length: the same batches for every method.

    With `told`, adapters are told this task id for the rows of every task; heads stay those of the rows' own task.

    A generated answer that cannot be read counts as a wrong one, a score that cannot be read as the mean score of the
    training rows; the note of the task's score says how many there were.

    Raises:
        Diverged: what an answer is chosen by is not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    parts = []
    for position, task in enumerate(tasks):
        order = sorted(range(len(task.validation)), key=lambda row, task=task: (task.validation[row].length, row))  # type: ignore[misc]
        chosen = np.empty(len(order))
        said: Floats | None = np.full((len(order), max(map(task.candidates, task.validation))), -np.inf)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = family.scoring_batch([(position, task.validation[row]) for row in places]).to(device)
            if told is not None:
                batch = replace(batch, task_ids=torch.full_like(batch.task_ids, told))
            with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                found = model.predict(batch)
            chosen[places] = found.chosen.double().cpu()
            if said is None or found.log_probabilities is None:
                said = None
            else:
                said[places, : found.log_probabilities.shape[1]] = found.log_probabilities.double().cpu()
        parts.append(_evaluate_task(task, chosen, said))
    return _joined(parts)


def evaluate_majority(tasks: Sequence[TokenisedTask]) -> Evaluation:
    """Score the best constant guess from the training labels.

    The most frequent class or choice (the lowest one where several are), or the mean score. A row that has fewer
    choices than the guess counts as wrong. Its probabilities are those of the prior.
    """
    parts = []
    for task in tasks:
        labels = [row.label for row in task.train]
        if task.spec.kind == "regression":
            guess = fmean(labels)
        else:
            counts = Counter(labels)
            guess = min(counts, key=lambda label: (-counts[label], label))
        chosen = np.full(len(task.validation), guess)
        parts.append(_describe(task, chosen, of_prior(task, chosen), None))
    return _joined(parts)


def _joined(parts: Sequence[tuple[str, Score, pd.DataFrame]]) -> Evaluation:
    scores = {name: score for name, score, _ in parts}
    return Evaluation(scores, pd.concat([frame for *_, frame in parts], ignore_index=True))


def _evaluate_task(task: TokenisedTask, chosen: Floats, said: Floats | None) -> tuple[str, Score, pd.DataFrame]:
    """One task, from the answers and the log-probabilities of all candidates, if there are any."""
    chosen, remark = _readable(task, chosen)
    if task.spec.kind == "regression":
        return _describe(task, chosen, of_scores(task, chosen), remark)
    return _describe(task, chosen, None if said is None else of_candidates(task, said, chosen), remark)


def _describe(
    task: TokenisedTask, chosen: Floats, likelihoods: RowLikelihoods | None, remark: str | None
) -> tuple[str, Score, pd.DataFrame]:
    regression = task.spec.kind == "regression"
    labels = np.array([row.label for row in task.validation])
    as_type = float if regression else int
    result = score(task.spec.metric, chosen.astype(as_type).tolist(), labels.astype(as_type).tolist())
    # Neither right nor wrong: regression is compared through its predictions.
    correct = np.full(len(labels), np.nan) if regression else (chosen == labels).astype(float)
    columns = {
        "task": task.spec.name,
        "index": [row.index for row in task.validation],
        "label": labels,
        "prediction": chosen,
        "correct": correct,
    }
    if likelihoods is not None:
        columns |= {
            "log_likelihood": likelihoods.log_likelihood,
            "prior_log_likelihood": likelihoods.prior,
            "confidence": likelihoods.confidence,
        }
    found = Score(
        metrics=dict(result.values),
        primary=result.primary,
        rows=len(labels),
        note="; ".join(filter(None, (result.note, remark))) or None,
        likelihood=None if likelihoods is None else likelihoods.summary(correct),
    )
    return task.spec.name, found, pd.DataFrame(columns)


def _readable(task: TokenisedTask, answers: Floats) -> tuple[Floats, str | None]:
    """The answers with something wrong in place of those that could not be read, and how many these were."""
    unread = answers == UNREADABLE
    if not unread.any():
        return answers, None
    if task.spec.kind == "regression":
        instead = np.full(len(answers), fmean(row.label for row in task.train))
    else:
        # A class or a choice that is not the right one.
        instead = np.array([float(row.label == 0) for row in task.validation])
    remark = f"{unread.sum()} of {len(answers)} generated answers cannot be read"
    return np.where(unread, instead, answers), remark
