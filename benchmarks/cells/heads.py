"""Heads before training: logistic regression with a ridge penalty on frozen features, to convergence, by scikit-learn.

A head that starts at random spends the first hundreds of steps on what a closed problem solves, and methods differ in
how they get over these steps. Started from the fit, a run measures what adapters add. The fit sees training rows alone
and is the same for all methods and seeds. By itself it is the row `head`. Its penalty is the best of five on held-out
thirds.

* Classes: the softmax of the head; of two classes z and -z, halved.
* Scores: the sigmoid of the head against the scaled score t. A row counts as true with weight t, as false with 1 - t.
* Choices: the right choice against every other one of its row, by the difference of their features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GroupKFold
from torch import nn

from benchmarks.backbones.load import BackboneSource
from benchmarks.cells.data import TokenisedTask
from benchmarks.families import AnyFamily
from benchmarks.families.batch import HeadRow
from benchmarks.families.encoder import Encoder, MultiTaskModel
from benchmarks.protocols.protocol import Protocol
from benchmarks.protocols.seeds import generator
from benchmarks.tasks.base import TaskSpec

# Inverse strengths of the penalty, on features of unit variance.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 3
ITERATIONS = 500
_BATCH = 64

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Head:
    """Weights (outputs, width) and biases (outputs,) of one linear head."""

    weight: Floats
    bias: Floats


@dataclass(frozen=True, slots=True)
class _Problem:
    """Rows of a logistic regression: features, class, weight, and the example that a row comes from."""

    features: Floats
    classes: NDArray[np.int64]
    weights: Floats
    examples: NDArray[np.int64]
    has_bias: bool = True


def fit_heads(
    tasks: Sequence[TokenisedTask], family: AnyFamily, source: BackboneSource, device: torch.device
) -> dict[str, Head]:
    """The heads of all tasks, from at most `Protocol.head_start_rows` training rows of each."""
    assert isinstance(family, Encoder)
    model = family.load(source, 0).to(device).eval()
    heads = {}
    for position, task in enumerate(tasks):
        rows = rows_of_fit(task, family.protocol)
        heads[task.spec.name] = fit_head(task.spec, rows, read_features(model, family, position, rows))
    return heads


def rows_of_fit(task: TokenisedTask, protocol: Protocol) -> list[HeadRow]:
    """The training rows of a task that its head is fitted on; they depend on the task's name alone."""
    order = generator("head start", task.spec.name).permutation(len(task.train))
    return [cast(HeadRow, task.train[at]) for at in sorted(map(int, order[: protocol.head_start_rows]))]


def start_from(model: MultiTaskModel, heads: Mapping[str, Head]) -> None:
    """Put fitted heads in the place of random ones."""
    with torch.no_grad():
        for name, head in heads.items():
            linear = cast(nn.Linear, model.heads[name])
            linear.weight.copy_(torch.as_tensor(head.weight))
            linear.bias.copy_(torch.as_tensor(head.bias))


def read_features(model: MultiTaskModel, family: Encoder, task: int, rows: Sequence[HeadRow]) -> list[Floats]:
    """What the head of a task reads of every row: (sequences, width) each."""
    device = next(model.parameters()).device
    found: list[Floats] = [np.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda at: rows[at].length)
    for start in range(0, len(order), _BATCH):
        places = order[start : start + _BATCH]
        batch = family.training_batch([(task, rows[at]) for at in places]).to(device)
        with torch.inference_mode():
            pooled = model.pool(batch).double().cpu().numpy()
        ends = np.cumsum([len(rows[at].sequences) for at in places])
        for at, features in zip(places, np.split(pooled, ends[:-1]), strict=True):
            found[at] = features
    return found


def fit_head(spec: TaskSpec, rows: Sequence[HeadRow], features: Sequence[Floats]) -> Head:
    """One head, from the features of every row's sequences."""
    outputs = len(spec.labels) if spec.kind == "classification" else 1
    whole = np.concatenate(features)
    centre, scale = whole.mean(0), whole.std(0) + 1e-9
    problem = _problem(spec, rows, [(one - centre) / scale for one in features])
    weight, bias = _coefficients(problem, outputs)
    return Head(weight / scale, bias - (weight / scale) @ centre)


def _problem(spec: TaskSpec, rows: Sequence[HeadRow], features: Sequence[Floats]) -> _Problem:
    labels, examples = np.array([row.label for row in rows]), np.arange(len(rows))
    if spec.kind == "multiple_choice":
        right = [one[int(label)] for one, label in zip(features, labels, strict=True)]
        pairs = [gold - np.delete(one, int(label), 0) for gold, one, label in zip(right, features, labels, strict=True)]
        owners = np.repeat(examples, [len(pair) for pair in pairs])
        both = np.concatenate([*pairs, *(-pair for pair in pairs)])
        classes = np.repeat([1, 0], len(owners))
        return _Problem(both, classes, np.ones(len(both)), np.tile(owners, 2), has_bias=False)
    whole = np.concatenate(features)
    if spec.kind == "classification":
        return _Problem(whole, labels.astype(int), np.ones(len(rows)), examples)
    low, high = spec.score_range
    share = (labels - low) / (high - low)
    classes = np.repeat([1, 0], len(rows))
    return _Problem(np.tile(whole, (2, 1)), classes, np.concatenate([share, 1 - share]), np.tile(examples, 2))


def _coefficients(problem: _Problem, outputs: int) -> tuple[Floats, Floats]:
    """Weights and biases of every output; of a class that no row has, the log of less than one row."""
    width = problem.features.shape[1]
    weight, bias = np.zeros((outputs, width)), np.full(outputs, -np.log(2.0 * len(problem.classes)))
    known = np.unique(problem.classes)
    if len(known) == 1:
        bias[known] = 0.0
        return weight, bias
    fit = _regression(problem, _best_strength(problem), np.arange(len(problem.classes)))
    slopes, offsets = fit.coef_, np.broadcast_to(fit.intercept_, len(fit.coef_))
    if outputs == 1:
        return slopes, np.array(offsets)
    if len(known) == 2:
        slopes, offsets = np.concatenate([-slopes, slopes]) / 2, np.concatenate([-offsets, offsets]) / 2
    weight[known], bias[known] = slopes, offsets
    return weight, bias


def _best_strength(problem: _Problem) -> float:
    """The strength with the least log-loss on held-out examples; the strongest of equals, or of too few rows."""
    losses = dict.fromkeys(STRENGTHS, 0.0)
    examples = len(np.unique(problem.examples))
    if examples < FOLDS:
        return STRENGTHS[0]
    known = np.unique(problem.classes)
    for rows, held_out in GroupKFold(FOLDS).split(problem.features, groups=problem.examples):
        if len(np.unique(problem.classes[rows])) < len(known):
            continue  # a class of one row: this part says nothing of it
        for strength in STRENGTHS:
            said = _regression(problem, strength, rows).predict_proba(problem.features[held_out])
            truth, weights = problem.classes[held_out], problem.weights[held_out]
            losses[strength] += log_loss(truth, said, labels=known, sample_weight=weights)
    return min(STRENGTHS, key=lambda strength: losses[strength])


def _regression(problem: _Problem, strength: float, rows: NDArray[np.int64]) -> LogisticRegression:
    model = LogisticRegression(C=strength, fit_intercept=problem.has_bias, max_iter=ITERATIONS)
    return model.fit(problem.features[rows], problem.classes[rows], sample_weight=problem.weights[rows])
