"""The eight GLUE tasks of the parameter-efficient fine-tuning papers (Wang et al. 2019, arXiv 1804.07461).

Reported rows are the official validation split, since the test labels are not public; for MNLI it is the
matched one (the mismatched one would be a second evaluation of the same task, and is left out). Hub rows are
taken as they are: 16 CoLA and 11 STS-B train rows also occur among the official validation rows.

Labels and columns are those of ``nyu-mll/glue``. Differences from the official number of rows are stated in
`TaskData.source`. No revision is pinned: the SHA-256 of the rows is part of every record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moepeft.errors import did_you_mean

from .base import Example, TaskData, TaskSpec
from .loading import Builder, Recipe, Row, Split, UnknownTask, bounded_score, class_index, load, text

HUB_ID = "nyu-mll/glue"


def _builder(columns: tuple[str, ...], spec: TaskSpec) -> Builder:
    def build(row: Row) -> Example:
        label: int | float
        if spec.label_range is None:
            label = class_index(row, "label", spec.labels)
        else:
            label = bounded_score(row, "label", *spec.label_range)
        first, *rest = (text(row, column) for column in columns)
        return Example(first=first, second=rest[0] if rest else None, label=label)

    return build


def _recipe(
    spec: TaskSpec, columns: tuple[str, ...], *, train: int, reported: int, reported_split: str = "validation"
) -> Recipe:
    return Recipe(
        spec=spec,
        folder=f"glue/{spec.name}",
        hub_id=HUB_ID,
        hub_config=spec.name,
        columns=(*columns, "label"),
        build=_builder(columns, spec),
        train=Split("train", train),
        reported=Split(reported_split, reported),
    )


def _classes(name: str, labels: tuple[str, ...], metric: str, **options: Any) -> TaskSpec:
    return TaskSpec(name=name, kind="classification", labels=labels, metric=metric, **options)


_STSB = TaskSpec(name="stsb", kind="regression", labels=(), metric="pearson_spearman", label_range=(0.0, 5.0))
_SENTENCES = ("sentence1", "sentence2")

_RECIPES: dict[str, Recipe] = {
    recipe.spec.name: recipe
    for recipe in (
        _recipe(
            _classes("cola", ("unacceptable", "acceptable"), "matthews"),
            ("sentence",),
            train=8_551,
            reported=1_043,
        ),
        _recipe(_classes("sst2", ("negative", "positive"), "accuracy"), ("sentence",), train=67_349, reported=872),
        _recipe(
            _classes("mrpc", ("not_equivalent", "equivalent"), "accuracy_f1"),
            _SENTENCES,
            train=3_668,
            reported=408,
        ),
        _recipe(_STSB, _SENTENCES, train=5_749, reported=1_500),
        _recipe(
            _classes("qqp", ("not_duplicate", "duplicate"), "accuracy_f1"),
            ("question1", "question2"),
            train=363_846,
            reported=40_430,
        ),
        _recipe(
            _classes("mnli", ("entailment", "neutral", "contradiction"), "accuracy"),
            ("premise", "hypothesis"),
            train=392_702,
            reported=9_815,
            reported_split="validation_matched",
        ),
        _recipe(
            _classes("qnli", ("entailment", "not_entailment"), "accuracy"),
            ("question", "sentence"),
            train=104_743,
            reported=5_463,
        ),
        _recipe(
            _classes("rte", ("entailment", "not_entailment"), "accuracy"),
            _SENTENCES,
            train=2_490,
            reported=277,
        ),
    )
}

GLUE_TASKS: dict[str, TaskSpec] = {name: recipe.spec for name, recipe in _RECIPES.items()}


def load_glue(name: str, *, data_dir: Path | None = None) -> TaskData:
    """Loads one GLUE task.

    Args:
        name: a key of `GLUE_TASKS`.
        data_dir: folder that holds ``glue/<task>/<split>.parquet``; ``None`` loads from the hub.

    Raises:
        UnknownTask: no such task.
        DataUnavailable: the folder lacks a file, or the hub cannot be reached.
        InvalidData: a file is damaged, lacks a column or holds a label out of range.
    """
    if name not in _RECIPES:
        raise UnknownTask(f"No GLUE task is called {name!r}.{did_you_mean(name, _RECIPES)}")
    return load(_RECIPES[name], data_dir)
