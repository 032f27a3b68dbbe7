"""Synthetic records and outcomes that hang together: scores are computed from the outcomes by the project's metrics."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.protocols.protocol import Protocol
from benchmarks.records.schema import (
    Budget,
    Cell,
    CurvePoint,
    EmbeddingMap,
    Memory,
    Parameters,
    Provenance,
    Quantiles,
    Routing,
    RunRecord,
    Score,
    SiteRouting,
    Status,
    TaskEmbeddings,
    Timing,
)
from benchmarks.tasks.metrics import score

TASKS = {"cola": "matthews", "mrpc": "accuracy_f1", "stsb": "pearson_spearman", "mnli": "accuracy", "rte": "accuracy"}
PROTOCOL: dict[str, Any] = {
    "name": "small",
    "tasks": list(TASKS),
    "backbone": "tiny-bert",
    "steps": 100,
    "batch_size": 8,
    "eval_rows": None,
    "timing": {"warmup": 1, "repeats": 5, "rows": 4, "length": 16},
}
ROWS = 120
ADAPTERS = {"majority": 0, "head": 0}


def make_cell(method: str = "alpha", seed: int = 0, **changes: Any) -> Cell:
    """A cell; `changes` replace its fields, those of `protocol` one by one."""
    protocol = Protocol.model_validate({**PROTOCOL, **changes.pop("protocol", {})})
    fields = {"data": {task: f"{task}-rows" for task in protocol.tasks}, "config": {"rank": 4}, **changes}
    return Cell(protocol=protocol, method=method, seed=seed, **fields)


def make_outcomes(cell: Cell, skill: float) -> pd.DataFrame:
    """Predictions right with probability `skill`; the labels are the same for every method and seed."""
    frames = []
    for number, task in enumerate(cell.protocol.tasks):
        labels = np.random.default_rng(number)
        noise = np.random.default_rng([number, cell.seed, sum(map(ord, cell.method))])
        if TASKS[task] == "pearson_spearman":
            label = labels.uniform(0, 5, ROWS)
            prediction = skill * label + (1 - skill) * noise.uniform(0, 5, ROWS)
            correct = np.full(ROWS, np.nan)
        else:
            classes = 3 if task == "mnli" else 2
            label = labels.integers(classes, size=ROWS).astype(float)
            wrong = (label + noise.integers(1, classes, size=ROWS)) % classes
            prediction = np.where(noise.random(ROWS) < skill, label, wrong)
            correct = (prediction == label).astype(float)
        columns = {"task": task, "index": range(ROWS), "label": label, "prediction": prediction, "correct": correct}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def scores_of(outcomes: pd.DataFrame) -> dict[str, Score]:
    scores = {}
    for task, rows in outcomes.groupby("task", sort=False):
        as_type = float if TASKS[str(task)] == "pearson_spearman" else int
        columns = [rows[name].astype(as_type).tolist() for name in ("prediction", "label")]
        result = score(TASKS[str(task)], *columns)
        scores[str(task)] = Score(metrics=dict(result.values), primary=result.primary, rows=len(rows), note=result.note)
    return scores


def make_record(
    method: str = "alpha",
    seed: int = 0,
    *,
    skill: float = 0.75,
    status: Status = "ok",
    reason: str | None = None,
    adapter: int | None = None,
    **changes: Any,
) -> tuple[RunRecord, pd.DataFrame | None]:
    """A record and its outcomes; a failed run has neither scores nor times. `changes` go to `make_cell`."""
    cell = make_cell(method, seed, **changes)
    size = ADAPTERS.get(method, 10_000 + 1_000 * len(method)) if adapter is None else adapter
    heads = 0 if method == "majority" else 650
    sites = 12 if size else 0
    common: dict[str, Any] = {
        "cell": cell,
        "status": status,
        "reason": reason,
        "parameters": Parameters(
            adapter=size, adapter_closed_form=size, adapter_shared=0, heads=heads, base=1_000_000, sites=sites,
            tasks=len(cell.protocol.tasks),
        ),
        "sources": {task: f"{task} set, 500 train and {ROWS} validation rows" for task in cell.protocol.tasks},
        "provenance": make_provenance(),
    }  # fmt: skip
    if status != "ok":
        return RunRecord(**common), None
    outcomes = make_outcomes(cell, skill)
    return RunRecord(**common, scores=scores_of(outcomes), **_cost(cell, trained=method != "majority")), outcomes


def make_provenance(**changes: Any) -> Provenance:
    fields: dict[str, Any] = {
        "commit": "0123456789abcdef",
        "dirty": False,
        "packages": {"torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.4.6"},
        "python": "3.11.9",
        "platform": "Linux",
        "device": "Example CPU, 2 cores",
        "threads": 2,
        "precision": "fp32",
        "deterministic": True,
        "started_utc": "2025-01-01T00:00:00+00:00",
        "command": "python -m benchmarks.run --suite small",
    }
    return Provenance(**fields | changes)


def _cost(cell: Cell, *, trained: bool) -> dict[str, Any]:
    if not trained:
        return {"timing": Timing(setup_seconds=0.1, train_seconds=0.0, evaluate_seconds=0.1)}
    step = 0.010 + 0.001 * len(cell.method) + 0.0001 * cell.seed
    quantiles = Quantiles(median=step, p10=0.9 * step, p90=1.2 * step, repeats=5)
    return {
        "budget": Budget(
            order_hash=hashlib.sha256(f"order {cell.seed}".encode()).hexdigest(),
            steps=100, rows=800, sequences=800, tokens=12_345, padded_tokens=16_000,
            rows_per_task=dict.fromkeys(cell.protocol.tasks, 160),
        ),
        "timing": Timing(
            setup_seconds=0.5, train_seconds=100 * step, evaluate_seconds=0.3, train_step=quantiles,
            inference_step=quantiles, train_over_bare=step / 0.005, inference_over_bare=step / 0.005,
            train_tokens_per_second=64 / step, inference_tokens_per_second=64 / step,
        ),
        "memory": Memory(peak_bytes=200 * 2**20, kind="tensors alive at once"),
        "curve": [
            CurvePoint(
                step=s, losses={"task": 1 / (1 + s / 20) + len(cell.method) / 50 + cell.seed / 40},
                learning_rate=1e-3, gradient_norm=1.0,
            )
            for s in range(0, 101, 10)
        ],
    }  # fmt: skip


def make_routing(tasks: list[str], *, layers: int = 6, roles: str = "q k v o up down", top_k: int = 2) -> Routing:
    """Gates of eight experts, of which every task has `top_k` at every site; embeddings in two clusters."""
    random = np.random.default_rng(5)
    sites = []
    for layer in range(layers):
        for role in roles.split():
            weights = np.zeros((len(tasks), 8))
            for row in weights:
                row[random.choice(8, top_k, replace=False)] = random.dirichlet(np.ones(top_k))
            shares = (weights > 0) / top_k
            entropy = -(weights * np.log(weights, where=weights > 0, out=np.zeros_like(weights))).sum(1)
            sites.append(
                SiteRouting(
                    site=f"layers.{layer}.{role}", role=role, layer=layer, weights=weights.round(4).tolist(),
                    shares=shares.round(4).tolist(), entropy=entropy.round(4).tolist(),
                )
            )  # fmt: skip
    table = random.normal(size=(len(tasks), 16))
    table[::2] += 2
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    maps = [
        EmbeddingMap(site=f"layers.{at}.q", points=table[:, at : at + 2].round(4).tolist(), explained=[0.4, 0.2])
        for at in (0, 1, 2)
    ]
    return Routing(
        tasks=tasks, rows=dict.fromkeys(tasks, 64), batch_rows=16, sites=sites,
        embeddings=TaskEmbeddings(cosine=(unit @ unit.T).round(4).tolist(), maps=maps),
    )  # fmt: skip
