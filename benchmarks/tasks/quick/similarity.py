"""Pairs of sentences: do they say the same, do they ask the same, how much do they share."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.tasks.base import Example
from benchmarks.tasks.quick.events import (
    action,
    contact,
    counted,
    gift,
    kind_and_thing,
    person,
    synonym,
    with_other_verb,
)
from benchmarks.tasks.quick.grammar import MOODS, Event, active, forms, passive, with_article
from benchmarks.tasks.quick.lexicon import Vocabulary
from benchmarks.tasks.quick.sampling import Draw

# --- paraphrase. Both classes go through the same rewording; a negative pair also has one change of meaning.


def _reword(draw: Draw, vocabulary: Vocabulary, event: Event, changed: Event) -> tuple[str, str]:
    first, second = draw.some(forms(event), 2)
    if draw.chance(0.5):
        changed = replace(changed, verb=synonym(vocabulary, changed.verb))
    return first(event), second(changed)


def _swap(event: Event) -> Event:
    if event.recipient:
        return replace(event, agent=event.recipient, recipient=event.agent)
    return replace(event, agent=event.patient, patient=event.agent)


def _change(draw: Draw, vocabulary: Vocabulary, event: Event) -> Event:
    """Another role, participant, number, verb or certainty."""
    is_reversible = bool(event.recipient) or event.patient in _people(vocabulary)
    if is_reversible and draw.chance(0.35):
        return _swap(event)
    kind = draw.below(4)
    if kind == 0:
        unwanted = (event.agent, event.patient, event.recipient)
        return replace(event, agent=person(draw, vocabulary, *unwanted))
    if kind == 1:
        return with_other_verb(draw, vocabulary, event)
    if kind == 2 and event.patient not in _people(vocabulary):
        return _other_things(draw, vocabulary, event)
    if kind == 2:
        return replace(event, patient=person(draw, vocabulary, event.agent, event.patient))
    return replace(event, mood=draw.other(MOODS, event.mood))


def _people(vocabulary: Vocabulary) -> frozenset[str]:
    names = {name for pair in vocabulary.names for name in pair}
    return frozenset(names | {f"the {role}" for role in vocabulary.roles})


def _other_things(draw: Draw, vocabulary: Vocabulary, event: Event) -> Event:
    number, _, noun = event.patient.partition(" ")
    if event.is_plural and draw.chance(0.5):
        return replace(event, patient=f"{draw.other(vocabulary.numbers, number)} {noun}")
    while True:
        patient, is_plural = counted(draw, vocabulary)
        if is_plural == event.is_plural and patient.split()[1] != noun:
            return replace(event, patient=patient, is_plural=is_plural)


def paraphrase(draw: Draw, vocabulary: Vocabulary, target: int) -> Example:
    """Two sentences; class 1 says the same."""
    event = draw.one((contact, contact, action, gift))(draw, vocabulary)
    event = replace(event, mood=draw.one(("plain", *MOODS)))
    changed = event if target == 1 else _change(draw, vocabulary, event)
    first, second = _reword(draw, vocabulary, event, changed)
    return Example(first, second, label=target)


# --- questions. A family has intents that ask different things of the same slots, each in several wordings.

_QUESTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "trip": (
        (
            "How long does it take to get from {0} to {1}?",
            "What is the journey time between {0} and {1}?",
            "How many hours is the trip from {0} to {1}?",
        ),
        (
            "How much does it cost to get from {0} to {1}?",
            "What is the ticket price between {0} and {1}?",
            "How much money is the trip from {0} to {1}?",
        ),
        (
            "How far is it from {0} to {1}?",
            "What is the distance between {0} and {1}?",
            "How many miles apart are {0} and {1}?",
        ),
    ),
    "thing": (
        ("Where can I get {0}?", "Which shop has {0} for sale?", "What is the right place to look for {0}?"),
        ("How much does {0} cost?", "What is the price of {0}?", "How much money should I pay for {0}?"),
        ("How much does {0} weigh?", "What is the average weight of {0}?", "How many pounds is {0} on average?"),
        ("How long does {0} last?", "What is the usual life span of {0}?", "For how many years can I use {0}?"),
    ),
    "job": (
        ("How do I become {0}?", "What does it take to be {0}?", "How can someone start a career as {0}?"),
        ("How much does {0} earn?", "What is the salary of {0}?", "How much money does {0} get per year?"),
        (
            "How many hours does {0} work per day?",
            "How long is the working day of {0}?",
            "How much time does {0} spend at work?",
        ),
    ),
    "city": (
        ("How costly is life in {0}?", "What does it cost to live in {0}?", "Is the cost of life high in {0}?"),
        ("What is the weather like in {0}?", "How hot does it get in {0}?", "Is the climate of {0} pleasant?"),
        ("What should I see in {0}?", "Which sights of {0} are worth seeing?", "What are the main sights of {0}?"),
        ("How many people live in {0}?", "What is the population of {0}?", "How large is {0} in terms of people?"),
    ),
}


def _slots(draw: Draw, vocabulary: Vocabulary, family: str) -> list[str]:
    if family == "trip":
        return draw.some(vocabulary.cities, 2)
    if family == "city":
        return draw.some(vocabulary.cities, 1)
    if family == "job":
        return [with_article(draw.one(vocabulary.roles))]
    return [with_article(draw.one(vocabulary.things[draw.one(vocabulary.belongings)]))]


def _other_slots(draw: Draw, vocabulary: Vocabulary, family: str, slots: list[str]) -> list[str]:
    while True:
        others = _slots(draw, vocabulary, family)
        if len(slots) == 2:
            others[draw.below(2)] = draw.one(slots)
        if set(others) != set(slots) and len(set(others)) == len(others):
            return others


def question_pair(draw: Draw, vocabulary: Vocabulary, target: int) -> Example:
    """Two questions; class 1 has the same answer."""
    family = draw.one(tuple(_QUESTIONS))
    intents = _QUESTIONS[family]
    slots = _slots(draw, vocabulary, family)
    intent = draw.one(intents)
    first, second = draw.some(range(len(intent)), 2)
    if target == 1:
        return Example(intent[first].format(*slots), intent[second].format(*slots), label=1)
    if draw.chance(0.5):
        others = _other_slots(draw, vocabulary, family, slots)
        return Example(intent[first].format(*slots), intent[second].format(*others), label=0)
    asked = draw.other(intents, intent)
    return Example(intent[first].format(*slots), asked[second].format(*slots), label=0)


# --- similarity. The score is 5 minus what the changed parts weigh; voice and synonyms cost nothing.

WEIGHTS = {"agent": 1.2, "verb": 1.2, "object": 1.2, "place": 0.8, "quality": 0.6}
RELATED = 0.5
"""Share of the object's weight that is lost when it becomes another member of the same kind."""


def graded_pair(draw: Draw, vocabulary: Vocabulary, target: int) -> Example:
    """Two sentences; `target` of the five parts differ, and the label is 5 minus their weights."""
    changed = set(draw.some(tuple(WEIGHTS), target))
    kind, thing = kind_and_thing(draw, vocabulary)
    quality = draw.one([word for pair in vocabulary.opposites for word in pair])
    verb = draw.one(draw.one(vocabulary.actions))
    event = Event(person(draw, vocabulary), verb, f"the {quality} {thing}", place=draw.one(vocabulary.places))

    lost = sum(WEIGHTS[part] for part in changed)
    if "object" in changed and draw.chance(0.5):
        thing = draw.other(vocabulary.things[kind], thing)
        lost -= WEIGHTS["object"] * RELATED
    elif "object" in changed:
        thing = kind_and_thing(draw, vocabulary, kind)[1]
    if "quality" in changed:
        quality = draw.one([word for pair in vocabulary.opposites if quality not in pair for word in pair])
    other = replace(event, verb=synonym(vocabulary, verb)) if draw.chance(0.4) else event
    if "verb" in changed:
        other = with_other_verb(draw, vocabulary, event)
    if "agent" in changed:
        other = replace(other, agent=person(draw, vocabulary, event.agent))
    if "place" in changed:
        other = replace(other, place=draw.other(vocabulary.places, event.place))
    other = replace(other, patient=f"the {quality} {thing}")
    # With nothing reworded, a pair without changes would be the same sentence twice.
    is_reworded = target == 0 or draw.chance(0.5)
    first, second = draw.some((active, passive), 2) if is_reworded else (active, active)
    return Example(first(event), second(other), label=round(5.0 - lost, 2))
