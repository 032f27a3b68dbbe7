"""A question and a text: does the sentence hold the answer, does the passage say yes."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.tasks.base import Example
from benchmarks.tasks.quick.events import kind_and_thing, person
from benchmarks.tasks.quick.grammar import past, sentence, with_article
from benchmarks.tasks.quick.lexicon import Vocabulary
from benchmarks.tasks.quick.sampling import Draw

_ASKED = ("where", "when", "why")


def answerable(draw: Draw, vocabulary: Vocabulary, target: int) -> Example:
    """A question and a sentence; class 0 holds the answer.

    The sentence tells two of place, time and reason. Without the answer it lacks the one that is asked, or tells it
    about another thing.
    """
    tells = {
        "where": draw.one(vocabulary.places),
        "when": draw.one(vocabulary.times),
        "why": draw.one(vocabulary.reasons),
    }
    agent, verb = person(draw, vocabulary), draw.one(draw.one(vocabulary.actions))
    kind, thing = kind_and_thing(draw, vocabulary)
    asked = draw.one(_ASKED)
    is_about_other = target == 1 and draw.chance(0.3)
    missing = asked if target == 1 and not is_about_other else draw.other(_ASKED, asked)
    told = [tells[key] for key in _ASKED if key != missing]
    named = kind_and_thing(draw, vocabulary, kind)[1] if is_about_other else thing
    question = sentence(asked, "did", agent, verb, "the", thing, end="?")
    return Example(question, sentence(agent, past(verb), "the", named, *told), label=target)


@dataclass(frozen=True, slots=True)
class _Profile:
    """Where someone is from, what they do and what they own."""

    city: str
    role: str
    thing: str


def _profiles(draw: Draw, vocabulary: Vocabulary, count: int) -> list[_Profile]:
    """Profiles that share nothing, not even a kind of thing."""
    kinds = draw.some(vocabulary.belongings, count)
    things = [with_article(draw.one(vocabulary.things[kind])) for kind in kinds]
    cities, roles = draw.some(vocabulary.cities, count), draw.some(vocabulary.roles, count)
    return [_Profile(cities[i], with_article(roles[i]), things[i]) for i in range(count)]


def _told(draw: Draw, profile: _Profile, subject: str) -> str:
    # One short sentence each: a mixed batch is padded to its longest row, and that is a row of this task.
    if draw.chance(0.5):
        return sentence(f"{subject}, {profile.role} from {profile.city}, owns {profile.thing}")
    return sentence(f"{subject} is {profile.role} from {profile.city} and owns {profile.thing}")


def yes_no(draw: Draw, vocabulary: Vocabulary, target: int) -> Example:
    """A yes/no question and a passage about two people; class 1 is yes.

    A false question names what belongs to the other person, or what nobody in the passage has.
    """
    profiles = _profiles(draw, vocabulary, 3)
    genders = [draw.below(2), draw.below(2)]
    names = [pair[gender] for pair, gender in zip(draw.some(vocabulary.names, 2), genders, strict=True)]
    relation = f"{('her', 'his')[genders[0]]} {draw.one(('friend', 'cousin', 'partner'))} {names[1]}"
    passage = " ".join(_told(draw, profiles[i], subject) for i, subject in enumerate((names[0], relation)))
    asked = draw.below(2)
    claimed = profiles[asked] if target == 1 else profiles[draw.one((1 - asked, 2))]
    name = names[asked]
    questions = (
        f"is {name} from {claimed.city}",
        f"is {name} {claimed.role}",
        f"does {name} own {claimed.thing}",
    )
    return Example(draw.one(questions), passage, label=target)
