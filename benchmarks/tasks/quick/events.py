"""Random events that make sense: a verb with the subjects and objects it takes."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.tasks.quick.grammar import Event, plural, with_article
from benchmarks.tasks.quick.lexicon import Vocabulary
from benchmarks.tasks.quick.sampling import Draw


def person(draw: Draw, vocabulary: Vocabulary, *unwanted: str) -> str:
    """A noun phrase for a person that is none of the unwanted ones."""
    roles = [f"the {role}" for role in vocabulary.roles]
    names = [name for pair in vocabulary.names for name in pair]
    return draw.other(roles if draw.chance(0.7) else names, *unwanted)


def kind_and_thing(draw: Draw, vocabulary: Vocabulary, *unwanted: str) -> tuple[str, str]:
    """A kind that is none of the unwanted ones, and a member of it."""
    kind = draw.other(list(vocabulary.things), *unwanted)
    return kind, draw.one(vocabulary.things[kind])


def counted(draw: Draw, vocabulary: Vocabulary) -> tuple[str, bool]:
    """A noun phrase for one thing or several, and whether it is plural."""
    _, thing = kind_and_thing(draw, vocabulary)
    if draw.chance(0.5):
        return f"{draw.one(vocabulary.numbers)} {plural(thing)}", True
    return with_article(thing), False


def _adjuncts(draw: Draw, vocabulary: Vocabulary) -> tuple[str, str]:
    place, time = draw.one(vocabulary.places), draw.one(vocabulary.times)
    return (place, time) if draw.chance(0.3) else draw.one(((place, ""), ("", time)))


def contact(draw: Draw, vocabulary: Vocabulary) -> Event:
    """Someone did something to someone, which could as well have been the other way round."""
    agent = person(draw, vocabulary)
    place, time = _adjuncts(draw, vocabulary)
    verb = draw.one(draw.one(vocabulary.contacts))
    return Event(agent, verb, person(draw, vocabulary, agent), place=place, time=time)


def action(draw: Draw, vocabulary: Vocabulary) -> Event:
    """Someone did something with one thing or several."""
    patient, is_plural = counted(draw, vocabulary)
    place, time = _adjuncts(draw, vocabulary)
    verb = draw.one(draw.one(vocabulary.actions))
    return Event(person(draw, vocabulary), verb, patient, is_plural, place=place, time=time)


def gift(draw: Draw, vocabulary: Vocabulary) -> Event:
    """Someone gave something to someone."""
    patient, is_plural = counted(draw, vocabulary)
    place, time = _adjuncts(draw, vocabulary)
    agent = person(draw, vocabulary)
    return Event(agent, draw.one(vocabulary.gifts), patient, is_plural, person(draw, vocabulary, agent), place, time)


def synonym(vocabulary: Vocabulary, verb: str) -> str:
    """The verb of the same meaning, or the verb itself where the lexicon has none."""
    for left, right in vocabulary.actions + vocabulary.contacts:
        if verb in {left, right}:
            return right if verb == left else left
    return verb


def with_other_verb(draw: Draw, vocabulary: Vocabulary, event: Event) -> Event:
    """The event with a verb of another meaning and the same kind of object."""
    if event.recipient:
        return replace(event, verb=draw.other(vocabulary.gifts, event.verb))
    is_action = any(event.verb in pair for pair in vocabulary.actions)
    pairs = vocabulary.actions if is_action else vocabulary.contacts
    return replace(event, verb=draw.one([verb for pair in pairs if event.verb not in pair for verb in pair]))
