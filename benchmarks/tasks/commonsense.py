"""Commonsense question answering: yes/no questions on a passage, and multiple choice.

Reported rows are the test split for OpenBookQA and ARC, as in the papers that report these tasks, and the
validation split for the others, whose test labels are not public. The validation splits of OpenBookQA and ARC
are not loaded: rows for selection come out of the train split, as for every other task. Hub rows are taken as
they are: 21 OpenBookQA and 3 ARC-Easy train rows also occur, with the same choices, in validation or test.

Choices keep the row's own order and number (ARC has three to five) and are found by the row's own labels,
which are letters in most rows and digits in some. In WinoGrande the blank stays an underscore in the
sentence, and the two candidates are the choices. Social IQa's context and question are joined by a space.

PIQA, Social IQa and WinoGrande can be loaded by name but are not part of the default suite. PIQA still is a
script in its repository, which `datasets` no longer runs, so its automatic Parquet conversion is read; Social
IQa, for the same reason, comes from a Parquet copy. No commit is pinned: the SHA-256 of the rows is part of
every record.
"""

from __future__ import annotations

from pathlib import Path

from moepeft.errors import did_you_mean

from .base import Example, TaskData, TaskSpec
from .loading import (
    BadValue,
    Builder,
    Recipe,
    Row,
    Split,
    UnknownTask,
    choice_index,
    class_index,
    load,
    text,
)


def _boolq(row: Row) -> Example:
    answer = row["answer"]
    if not isinstance(answer, bool):
        raise BadValue("answer", answer, "true or false")
    return Example(first=text(row, "question"), second=text(row, "passage"), label=int(answer))


def _labelled_choices(question_column: str) -> Builder:
    def build(row: Row) -> Example:
        choices = row["choices"]
        wanted = "two or more texts with as many different labels, as {'text': [...], 'label': [...]}"
        if not isinstance(choices, dict) or not {"text", "label"} <= choices.keys():
            raise BadValue("choices", choices, wanted)
        texts, labels = choices["text"] or (), choices["label"] or ()
        complete = all(isinstance(value, str) for value in (*texts, *labels))
        if not complete or not len(texts) == len(labels) == len(set(labels)) or len(texts) < 2:
            raise BadValue("choices", choices, wanted)
        return Example(
            first=text(row, question_column),
            choices=tuple(value.strip() for value in texts),
            label=choice_index(row, "answerKey", labels),
        )

    return build


def _piqa(row: Row) -> Example:
    label = class_index(row, "label", ("sol1", "sol2"))
    return Example(first=text(row, "goal"), choices=(text(row, "sol1"), text(row, "sol2")), label=label)


def _social_iqa(row: Row) -> Example:
    return Example(
        first=f"{text(row, 'context')} {text(row, 'question')}",
        choices=tuple(text(row, column) for column in ("answerA", "answerB", "answerC")),
        label=choice_index(row, "label", ("1", "2", "3")),
    )


def _winogrande(row: Row) -> Example:
    return Example(
        first=text(row, "sentence"),
        choices=(text(row, "option1"), text(row, "option2")),
        label=choice_index(row, "answer", ("1", "2")),
    )


def _multiple_choice(name: str) -> TaskSpec:
    return TaskSpec(name=name, kind="multiple_choice", labels=(), metric="accuracy")


_RECIPES: dict[str, Recipe] = {
    recipe.spec.name: recipe
    for recipe in (
        Recipe(
            spec=TaskSpec(
                name="boolq",
                kind="classification",
                labels=("no", "yes"),
                metric="accuracy",
                truncate="only_second",
            ),
            folder="commonsense/boolq",
            hub_id="google/boolq",
            hub_config=None,
            columns=("question", "passage", "answer"),
            build=_boolq,
            train=Split("train", 9_427),
            reported=Split("validation", 3_270),
        ),
        Recipe(
            spec=_multiple_choice("openbookqa"),
            folder="commonsense/openbookqa",
            hub_id="allenai/openbookqa",
            hub_config="main",
            columns=("question_stem", "choices", "answerKey"),
            build=_labelled_choices("question_stem"),
            train=Split("train", 4_957),
            reported=Split("test", 500),
        ),
        Recipe(
            spec=_multiple_choice("arc_easy"),
            folder="commonsense/arc_easy",
            hub_id="allenai/ai2_arc",
            hub_config="ARC-Easy",
            columns=("question", "choices", "answerKey"),
            build=_labelled_choices("question"),
            train=Split("train", 2_251),
            reported=Split("test", 2_376),
        ),
        Recipe(
            spec=_multiple_choice("arc_challenge"),
            folder="commonsense/arc_challenge",
            hub_id="allenai/ai2_arc",
            hub_config="ARC-Challenge",
            columns=("question", "choices", "answerKey"),
            build=_labelled_choices("question"),
            train=Split("train", 1_119),
            reported=Split("test", 1_172),
        ),
        Recipe(
            spec=_multiple_choice("piqa"),
            folder="commonsense/piqa",
            hub_id="ybisk/piqa",
            hub_config=None,
            columns=("goal", "sol1", "sol2", "label"),
            build=_piqa,
            train=Split("train", 16_113),
            reported=Split("validation", 1_838),
            revision="refs/convert/parquet",
        ),
        Recipe(
            spec=_multiple_choice("social_iqa"),
            folder="commonsense/social_iqa",
            hub_id="lighteval/siqa",
            hub_config=None,
            columns=("context", "question", "answerA", "answerB", "answerC", "label"),
            build=_social_iqa,
            train=Split("train", 33_410),
            reported=Split("validation", 1_954),
        ),
        Recipe(
            spec=_multiple_choice("winogrande"),
            folder="commonsense/winogrande",
            hub_id="allenai/winogrande",
            hub_config="winogrande_xl",
            columns=("sentence", "option1", "option2", "answer"),
            build=_winogrande,
            train=Split("train", 40_398),
            reported=Split("validation", 1_267),
        ),
    )
}

COMMONSENSE_TASKS: dict[str, TaskSpec] = {name: recipe.spec for name, recipe in _RECIPES.items()}


def load_commonsense(name: str, *, data_dir: Path | None = None) -> TaskData:
    """Loads one commonsense task.

    Args:
        name: a key of `COMMONSENSE_TASKS`.
        data_dir: folder that holds ``commonsense/<task>/<split>.parquet``; ``None`` loads from the hub.

    Raises:
        UnknownTask: no such task.
        DataUnavailable: the folder lacks a file, or the hub cannot be reached.
        InvalidData: a file is damaged, lacks a column or holds an answer that is not among the choices.
    """
    if name not in _RECIPES:
        raise UnknownTask(f"No commonsense task is called {name!r}.{did_you_mean(name, _RECIPES)}")
    return load(_RECIPES[name], data_dir)
