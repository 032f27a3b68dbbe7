"""Pairs of sentences: does the second follow from the first.

Labels are numbered as in GLUE: entailment is 0; three-way, neutral is 1 and contradiction 2.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.tasks.base import Example
from benchmarks.tasks.quick.events import action, contact, kind_and_thing, person
from benchmarks.tasks.quick.grammar import (
    Event,
    active,
    forms,
    participle,
    passive,
    past,
    plural,
    sentence,
    with_article,
)
from benchmarks.tasks.quick.lexicon import Vocabulary
from benchmarks.tasks.quick.sampling import Draw

ENTAILMENT, NEUTRAL, CONTRADICTION = 0, 1, 2
Pair = tuple[str, str]

# --- three-way. Over the schemas, each class denies in one of three hypotheses: a "not" says nothing by itself.


def _quality(draw: Draw, vocabulary: Vocabulary, target: int) -> Pair:
    """A small violin: it was small, it was old, it was big."""
    pair = draw.one(vocabulary.opposites)
    side = draw.below(2)
    quality = {ENTAILMENT: pair[side], CONTRADICTION: pair[1 - side]}.get(target)
    if quality is None:
        quality = draw.one([word for other in vocabulary.opposites if other != pair for word in other])
    agent, verb = person(draw, vocabulary), past(draw.one(draw.one(vocabulary.actions)))
    _, thing = kind_and_thing(draw, vocabulary)
    premise = sentence(agent, verb, with_article(f"{pair[side]} {thing}"), draw.one(vocabulary.places))
    return premise, sentence("the", thing, "that", agent, verb, "was", quality)


def _asserted(draw: Draw, vocabulary: Vocabulary, target: int) -> Pair:
    """Bought a violin: bought an instrument, bought a hammer, did not buy an instrument."""
    kind, thing = kind_and_thing(draw, vocabulary)
    event = replace(_bare(draw, vocabulary), patient=with_article(thing))
    other_kind, other_thing = kind_and_thing(draw, vocabulary, kind)
    named = (other_kind, other_thing) if target == NEUTRAL else (kind, thing)
    changed = replace(event, patient=with_article(named[0] if draw.chance(0.7) else named[1]))
    if target == CONTRADICTION:
        changed = replace(changed, mood="negated")
    elif changed == event:
        return active(event), passive(changed)
    return active(event), active(changed)


def _denied(draw: Draw, vocabulary: Vocabulary, target: int) -> Pair:
    """Did not buy an instrument: did not buy a violin, did not buy a hammer, bought a violin."""
    kind, thing = kind_and_thing(draw, vocabulary)
    event = replace(_bare(draw, vocabulary), patient=with_article(kind), mood="negated")
    named = kind_and_thing(draw, vocabulary, kind)[1] if target == NEUTRAL else thing
    changed = replace(event, patient=with_article(named))
    if target == CONTRADICTION:
        changed = replace(changed, mood="plain")
    return active(event), active(changed)


def _bare(draw: Draw, vocabulary: Vocabulary) -> Event:
    verb = draw.one(draw.one(vocabulary.actions))
    return Event(person(draw, vocabulary), verb, "", place=draw.one(vocabulary.places))


def three_way(draw: Draw, vocabulary: Vocabulary, target: int) -> Example:
    """Premise and hypothesis; entailment, neutral or contradiction."""
    premise, hypothesis = draw.one((_quality, _asserted, _denied))(draw, vocabulary, target)
    return Example(premise, hypothesis, label=target)


# --- two-way


def _roles(draw: Draw, vocabulary: Vocabulary, *, follows: bool) -> Pair:
    """The judge helped the farmer: who helped whom."""
    event = contact(draw, vocabulary)
    changed = event
    if not follows and draw.chance(0.5):
        changed = replace(event, agent=event.patient, patient=event.agent)
    elif not follows:
        changed = replace(event, agent=person(draw, vocabulary, event.agent, event.patient))
    first, second = draw.some(forms(event), 2)
    return first(event), second(changed)


def _conjunction(draw: Draw, vocabulary: Vocabulary, *, follows: bool) -> Pair:
    """A sparrow and a hammer: was one of them a bird, was one of them a fish."""
    kind, thing = kind_and_thing(draw, vocabulary)
    other_kind, other_thing = kind_and_thing(draw, vocabulary, kind)
    third_kind, _ = kind_and_thing(draw, vocabulary, kind, other_kind)
    event = _bare(draw, vocabulary)
    both = f"{with_article(thing)} and {with_article(other_thing)}"
    claimed = draw.one((kind, other_kind)) if follows else third_kind
    return active(replace(event, patient=both)), active(replace(event, patient=with_article(claimed)))


def _complement(draw: Draw, vocabulary: Vocabulary, *, follows: bool) -> Pair:
    """Knew that, or believed that; managed to, or refused to."""
    event = replace(action(draw, vocabulary), time="")
    if draw.chance(0.5):
        verb = draw.one(vocabulary.achieving if follows else vocabulary.attempting)
        return sentence(event.agent, past(verb), "to", event.verb, event.patient, event.place), active(event)
    verb = past(draw.one(vocabulary.factive if follows else vocabulary.opinion))
    clause = f"{event.agent} had {participle(event.verb)} {event.patient}"
    return sentence(person(draw, vocabulary, event.agent), verb, "that", clause, event.place), active(event)


_UPWARD = ("some", "several", "a few")
_DOWNWARD = ("no", "all", "hardly any")


def _quantifier(draw: Draw, vocabulary: Vocabulary, *, follows: bool) -> Pair:
    """Some sparrows make some birds; no birds make no sparrows; and not the other way round."""
    kind, thing = kind_and_thing(draw, vocabulary)
    is_upward = draw.chance(0.5)
    quantifier = draw.one(_UPWARD if is_upward else _DOWNWARD)
    first, second = (thing, kind) if is_upward == follows else (kind, thing)
    verb = participle(draw.one(draw.one(vocabulary.actions)))
    rest = f"were {verb} by {person(draw, vocabulary)} {draw.one(vocabulary.places)}"
    return sentence(quantifier, plural(first), rest), sentence(quantifier, plural(second), rest)


def two_way(draw: Draw, vocabulary: Vocabulary, target: int) -> Example:
    """Premise and hypothesis; entailment or not."""
    rule = draw.one((_roles, _conjunction, _conjunction, _complement, _quantifier))
    premise, hypothesis = rule(draw, vocabulary, follows=target == ENTAILMENT)
    return Example(premise, hypothesis, label=target)
