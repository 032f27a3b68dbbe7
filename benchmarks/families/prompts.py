"""Tasks as text: the prompt of an example, its candidate answers, and which of them is right.

Text to text (`seq2seq`): the GLUE prompts and label words are those of T5 (Raffel et al. 2020, arXiv 1910.10683,
appendix D), e.g. ``mrpc sentence1: ... sentence2: ...`` with ``equivalent`` or ``not_equivalent``; STS-B's score is a
text of one decimal on a grid of 0.2, as there. The other tasks are written alike.

Decoder-only (`causal`): one line per part, then ``Answer:``. A multiple-choice prompt lists the choices, and the answer
is the text of the right one; published runs on these sets mostly train on its letter instead. A cloze prompt lists
none: small models answer what follows, and do not read a list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.tasks.base import Example, TaskSpec

# Distance of neighbouring scores as text, and how they are written.
GRID_STEP = 0.2
ANSWER_CUE = "Answer:"

# What T5 calls the parts of a pair, in its order, where that is not sentence1 and sentence2.
_CAPTIONS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "mnli": (("hypothesis", "second"), ("premise", "first")),
    "qnli": (("question", "first"), ("sentence", "second")),
    "qqp": (("question1", "first"), ("question2", "second")),
}
_PAIR = (("sentence1", "first"), ("sentence2", "second"))


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a prompt.

    Attributes:
        caption: stands before the text; may be empty.
        text: of the example.
        gives: whether the length limit may take from its end.
    """

    caption: str
    text: str
    gives: bool


Render = Callable[[str, Sequence[Section]], str]


def sections_of(spec: TaskSpec, example: Example, *, listed: bool = True) -> tuple[Section, ...]:
    """The parts of an example's prompt. Of questions on a passage only the passage gives way to the length limit.

    Args:
        spec: the task.
        example: one of its rows.
        listed: whether the choices of a multiple-choice row are shown before one of them is to follow.
    """
    if spec.kind == "multiple_choice":
        if not example.choices:
            raise ValueError(f"task {spec.name}: a multiple-choice row without choices: {example.first!r}")
        if not listed:
            return _question(example)
        shown = " ".join(f"({chr(ord('A') + at)}) {choice}" for at, choice in enumerate(example.choices))
        return (*_question(example), Section("choices", shown, False))
    if spec.truncate == "only_second":
        return _question(example)
    if example.second is None:
        return (Section("sentence", example.first, True),)
    captions = _CAPTIONS.get(task_title(spec), _PAIR)
    return tuple(Section(caption, getattr(example, part), True) for caption, part in captions)


def _question(example: Example) -> tuple[Section, ...]:
    passage = () if example.second is None else (Section("passage", example.second, True),)
    return (*passage, Section("question", example.first, False))


def text_to_text(name: str, sections: Sequence[Section]) -> str:
    """``rte sentence1: ... sentence2: ...``."""
    return " ".join((name, *(f"{section.caption}: {section.text}" for section in sections)))


def to_be_continued(name: str, sections: Sequence[Section], *, titled: bool = False) -> str:
    """One line per part, and the cue. The task is named where the parts would not tell it, or always if `titled`."""
    told = {section.caption for section in sections} & {"question", "passage", "choices"}
    head = (f"Task: {name}",) if titled or not told else ()
    lines = (f"{section.caption.capitalize()}: {section.text}" for section in sections)
    return "\n".join((*head, *lines, ANSWER_CUE))


def task_title(spec: TaskSpec) -> str:
    """The name of the task, or of the one that a generated task follows."""
    return spec.name.removeprefix("q_")


# ---------------------------------------------------------------------- answers


def answers_of(spec: TaskSpec, example: Example) -> tuple[str, ...]:
    """The candidate answers: label words, the row's choices, or all scores of the grid."""
    if spec.kind == "multiple_choice":
        return example.choices
    return spec.labels if spec.kind == "classification" else tuple(f"{value:.1f}" for value in grid(spec))


def gold_of(spec: TaskSpec, label: float) -> int:
    """Position of the right answer among them; of a score, of the nearest one of the grid."""
    if spec.kind != "regression":
        return int(label)
    return round((label - spec.score_range[0]) / GRID_STEP)


def grid(spec: TaskSpec) -> tuple[float, ...]:
    """The scores of a regression task that have a text: ``0.0, 0.2, ..., 5.0``."""
    low, high = spec.score_range
    return tuple(round(low + at * GRID_STEP, 1) for at in range(round((high - low) / GRID_STEP) + 1))
