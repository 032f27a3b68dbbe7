"""Inflection and clauses: one event, and the ways English has to tell it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Mood = Literal["plain", "negated", "possible"]
MOODS: tuple[Mood, ...] = ("plain", "negated", "possible")
VOWELS = "aeiou"

IRREGULAR_VERBS: dict[str, tuple[str, str]] = {
    "be": ("was", "been"),
    "bring": ("brought", "brought"),
    "buy": ("bought", "bought"),
    "choose": ("chose", "chosen"),
    "draw": ("drew", "drawn"),
    "find": ("found", "found"),
    "forgive": ("forgave", "forgiven"),
    "give": ("gave", "given"),
    "hide": ("hid", "hidden"),
    "hurt": ("hurt", "hurt"),
    "know": ("knew", "known"),
    "lend": ("lent", "lent"),
    "sell": ("sold", "sold"),
    "send": ("sent", "sent"),
    "show": ("showed", "shown"),
    "sleep": ("slept", "slept"),
    "steal": ("stole", "stolen"),
    "swim": ("swam", "swum"),
    "teach": ("taught", "taught"),
    "think": ("thought", "thought"),
}
DOUBLING = frozenset({"hug", "plan", "regret", "spot"})
IRREGULAR_PLURALS = {"woman": "women", "man": "men", "fish": "fish", "knife": "knives"}


def plural(noun: str) -> str:
    """`box` -> `boxes`."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    return _add_s(noun)


def third_person(verb: str) -> str:
    """`cry` -> `cries`."""
    return _add_s(verb)


def _add_s(word: str) -> str:
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in VOWELS:
        return word[:-1] + "ies"
    return word + "s"


def past(verb: str) -> str:
    """`cry` -> `cried`."""
    return IRREGULAR_VERBS[verb][0] if verb in IRREGULAR_VERBS else _add_ed(verb)


def participle(verb: str) -> str:
    """`hide` -> `hidden`."""
    return IRREGULAR_VERBS[verb][1] if verb in IRREGULAR_VERBS else _add_ed(verb)


def _add_ed(verb: str) -> str:
    if verb.endswith("e"):
        return verb + "d"
    if verb in DOUBLING:
        return verb + verb[-1] + "ed"
    if verb.endswith("y") and verb[-2] not in VOWELS:
        return verb[:-1] + "ied"
    return verb + "ed"


def with_article(noun: str) -> str:
    """`apple` -> `an apple`."""
    return f"{'an' if noun[0].lower() in VOWELS else 'a'} {noun}"


def sentence(*parts: str, end: str = ".") -> str:
    """Joins the non-empty parts, starts with a capital letter and ends with `end`."""
    text = " ".join(part for part in parts if part)
    return text[0].upper() + text[1:] + end


@dataclass(frozen=True, slots=True)
class Event:
    """Who did what to whom, where and when, and whether it is asserted, denied or possible."""

    agent: str
    verb: str
    patient: str
    is_plural: bool = False
    recipient: str = ""
    place: str = ""
    time: str = ""
    mood: Mood = "plain"


def _active_verb(event: Event) -> str:
    if event.mood == "negated":
        return f"did not {event.verb}"
    if event.mood == "possible":
        return f"may have {participle(event.verb)}"
    return past(event.verb)


def _passive_verb(event: Event) -> str:
    if event.mood == "possible":
        return f"may have been {participle(event.verb)}"
    auxiliary = "were" if event.is_plural else "was"
    return f"{auxiliary}{' not' if event.mood == 'negated' else ''} {participle(event.verb)}"


def _to_recipient(event: Event) -> str:
    return f"to {event.recipient}" if event.recipient else ""


def active(event: Event) -> str:
    """The doctor helped the lawyer in the kitchen."""
    return sentence(event.agent, _active_verb(event), event.patient, _to_recipient(event), event.place, event.time)


def passive(event: Event) -> str:
    """The lawyer was helped by the doctor in the kitchen."""
    by = f"by {event.agent}"
    return sentence(event.patient, _passive_verb(event), _to_recipient(event), by, event.place, event.time)


def fronted(event: Event) -> str:
    """In the kitchen, the doctor helped the lawyer."""
    first, second = (event.place, event.time) if event.place else (event.time, "")
    return sentence(first + ",", event.agent, _active_verb(event), event.patient, _to_recipient(event), second)


def double_object(event: Event) -> str:
    """The doctor gave the lawyer a violin in the kitchen."""
    return sentence(event.agent, _active_verb(event), event.recipient, event.patient, event.place, event.time)


def forms(event: Event) -> list[Callable[[Event], str]]:
    """The ways to tell this event, the plainest first."""
    ways: list[Callable[[Event], str]] = [active, passive]
    if event.place or event.time:
        ways.append(fronted)
    if event.recipient:
        ways.append(double_object)
    return ways
