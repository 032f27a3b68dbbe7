"""Multiple choice over the facts of the lexicon; every wrong choice is the right one of another question."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.tasks.base import Example
from benchmarks.tasks.quick.grammar import with_article
from benchmarks.tasks.quick.lexicon import Pairs, Table, Vocabulary
from benchmarks.tasks.quick.sampling import Draw

Draft = tuple[str, str, list[str]]
"""Question, right choice, and all wrong choices there are."""
Fact = Callable[[Draw, Vocabulary], Draft]

FOUR = tuple((position, 4) for position in range(4))
THREE_TO_FIVE = tuple((position, size) for size in (3, 4, 5) for position in range(size))


def _laid_out(draw: Draw, draft: Draft, label: int, size: int) -> Example:
    question, right, wrong = draft
    choices = draw.some(sorted(set(wrong) - {right}), size - 1)
    choices.insert(label, right)
    return Example(question, choices=tuple(choices), label=label)


def _a(noun: str) -> str:
    """An article for a noun that has none: `den` -> `a den`, but `the ocean`, `France` as they are."""
    return noun if noun.startswith(("a ", "an ", "the ")) or noun[0].isupper() else with_article(noun)


def _related(draw: Draw, pairs: Pairs, forward: Sequence[str], backward: Sequence[str]) -> Draft:
    """Asks for the right side given the left one, or the other way round."""
    left, right = draw.one(pairs)
    if draw.chance(0.5):
        return draw.one(forward).format(_a(left)), right, [other for _, other in pairs]
    return draw.one(backward).format(_a(right)), left, [other for other, _ in pairs]


# --- elementary facts


def _material(draw: Draw, vocabulary: Vocabulary) -> Draft:
    material = draw.one(tuple(vocabulary.materials))
    thing = draw.one(vocabulary.materials[material])
    if draw.chance(0.5):
        question = draw.one(("What is {0} usually made of?", "Which material is used for {0}?"))
        return question.format(_a(thing)), material, list(vocabulary.materials)
    wrong = [other for key, items in vocabulary.materials.items() if key != material for other in items]
    question = draw.one(("Which of these is usually made of {0}?", "Which thing consists of {0}?"))
    return question.format(material), thing, wrong


def _purpose(draw: Draw, vocabulary: Vocabulary) -> Draft:
    pairs = tuple((tool, purpose) for _, tool, purpose in vocabulary.workers)
    tool, purpose = draw.one(pairs)
    if draw.chance(0.5):
        question = draw.one(("What is {0} used for?", "What do people do with {0}?"))
        return question.format(_a(tool)), purpose, [other for _, other in pairs]
    question = draw.one(("What is used for {0}?", "Which of these is the right object for {0}?"))
    return question.format(purpose), _a(tool), [_a(other) for other, _ in pairs]


def _equipment(draw: Draw, vocabulary: Vocabulary) -> Draft:
    pairs = tuple((worker, tool) for worker, tool, _ in vocabulary.workers)
    return _related(
        draw,
        pairs,
        ("What does {0} need for the job?", "Which object belongs to the job of {0}?"),
        ("Who needs {0} for the job?", "Whose job requires {0}?"),
    )


def _workplace(draw: Draw, vocabulary: Vocabulary) -> Draft:
    return _related(
        draw,
        vocabulary.workplaces,
        ("Where does {0} work?", "Where does {0} spend the working day?"),
        ("Who works in {0}?", "Who is at work in {0}?"),
    )


def _young(draw: Draw, vocabulary: Vocabulary) -> Draft:
    return _related(
        draw,
        vocabulary.young,
        ("What is the young of {0}?", "What will grow up to be {0}?"),
        ("What does {0} become when it grows up?", "Which animal was once {0}?"),
    )


def _sound(draw: Draw, vocabulary: Vocabulary) -> Draft:
    animal, sound = draw.one(vocabulary.sounds)
    if draw.chance(0.5):
        return f"Which sound comes from {_a(animal)}?", sound, [other for _, other in vocabulary.sounds]
    return f"From which animal comes the sound {sound}?", animal, [other for other, _ in vocabulary.sounds]


def _home(draw: Draw, vocabulary: Vocabulary) -> Draft:
    return _related(
        draw,
        vocabulary.homes,
        ("Where does {0} live?", "Which place is the home of {0}?"),
        ("Which animal lives in {0}?", "For which animal is {0} a home?"),
    )


# --- kinds


def _kinds(vocabulary: Vocabulary) -> Table:
    return vocabulary.things | vocabulary.scenery


def _strangers(kinds: Table, kind: str) -> list[str]:
    return [other for key, members in kinds.items() if key != kind for other in members]


def _member(draw: Draw, vocabulary: Vocabulary) -> Draft:
    kinds = _kinds(vocabulary)
    kind = draw.one(tuple(kinds))
    question = draw.one(("Which of these is {0}?", "Which word names {0}?", "Which one is an example of {0}?"))
    return question.format(with_article(kind)), draw.one(kinds[kind]), _strangers(kinds, kind)


def _kind(draw: Draw, vocabulary: Vocabulary) -> Draft:
    kinds = _kinds(vocabulary)
    kind = draw.one(tuple(kinds))
    question = draw.one(("What kind of thing is meant by {0}?", "To which group does the word {0} belong?"))
    return question.format(draw.one(kinds[kind])), kind, list(kinds)


# --- two steps: through the kind, the tool or the material that the question does not name


def _sibling(draw: Draw, vocabulary: Vocabulary) -> Draft:
    kinds = _kinds(vocabulary)
    kind = draw.one(tuple(kinds))
    first, second = draw.some(kinds[kind], 2)
    question = draw.one(("Which of these is the same kind of thing as {0}?", "Which one belongs in a group with {0}?"))
    return question.format(first), second, _strangers(kinds, kind)


def _of_kind(draw: Draw, vocabulary: Vocabulary, pairs: Pairs, forward: str, backward: str) -> Draft:
    kinds = _kinds(vocabulary)
    kind, fact = draw.one(pairs)
    noun = draw.one(kinds[kind])
    if draw.chance(0.5):
        return forward.format(with_article(noun)), fact, [other for _, other in pairs]
    known = {key: kinds[key] for key, _ in pairs}
    return backward.format(fact), noun, _strangers(known, kind)


def _part(draw: Draw, vocabulary: Vocabulary) -> Draft:
    return _of_kind(draw, vocabulary, vocabulary.parts, "What does {0} have?", "Which of these has {0}?")


def _use(draw: Draw, vocabulary: Vocabulary) -> Draft:
    forward, backward = "Why would someone need {0}?", "Which of these would someone need {0}?"
    return _of_kind(draw, vocabulary, vocabulary.uses, forward, backward)


def _task(draw: Draw, vocabulary: Vocabulary) -> Draft:
    worker, _, purpose = draw.one(vocabulary.workers)
    question = draw.one(("Whose job involves a device for {0}?", "Who owns the right object for {0}?"))
    return question.format(purpose), f"the {worker}", [f"the {other}" for other, _, _ in vocabulary.workers]


def _same_material(draw: Draw, vocabulary: Vocabulary) -> Draft:
    material = draw.one(tuple(vocabulary.materials))
    first, second = draw.some(vocabulary.materials[material], 2)
    question = f"Which of these is made of the same material as {_a(first)}?"
    return question, second, _strangers(vocabulary.materials, material)


_OPENBOOK: tuple[Fact, ...] = (_material, _material, _purpose, _purpose, _equipment, _workplace)
_EASY: tuple[Fact, ...] = (_member, _member, _member, _kind, _young, _sound, _home)
_CHALLENGE: tuple[Fact, ...] = (_sibling, _sibling, _sibling, _part, _use, _task, _same_material)


def open_book(draw: Draw, vocabulary: Vocabulary, target: int) -> Example:
    """Materials, purposes, tools and places of work."""
    return _laid_out(draw, draw.one(_OPENBOOK)(draw, vocabulary), *FOUR[target])


def easy(draw: Draw, vocabulary: Vocabulary, target: int) -> Example:
    """Kinds, and elementary facts about animals."""
    return _laid_out(draw, draw.one(_EASY)(draw, vocabulary), *FOUR[target])


def challenge(draw: Draw, vocabulary: Vocabulary, target: int) -> Example:
    """Questions in two steps, with three to five choices."""
    return _laid_out(draw, draw.one(_CHALLENGE)(draw, vocabulary), *THREE_TO_FIVE[target])
