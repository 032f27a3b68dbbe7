"""Single sentences: is it grammatical, is it favourable."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.tasks.base import Example
from benchmarks.tasks.quick.grammar import participle, past, plural, sentence, third_person, with_article
from benchmarks.tasks.quick.lexicon import Vocabulary
from benchmarks.tasks.quick.sampling import Draw

# --- acceptability. Both halves of a contrast occur equally often with either label, so no word gives it away.


def _object(draw: Draw, vocabulary: Vocabulary) -> str:
    kind = draw.one(list(vocabulary.things))
    return draw.one(vocabulary.things[kind])


def _agreement(draw: Draw, vocabulary: Vocabulary, *, good: bool) -> str:
    """The farmers near the judge (laugh / *laughs) in the office."""
    head, attractor = draw.some(vocabulary.roles, 2)
    is_plural = draw.chance(0.5)
    subject = plural(head) if is_plural else head
    if draw.chance(0.3):
        subject += f" {draw.one(('near', 'behind', 'beside'))} the {attractor}"
    use_plural = is_plural == good
    if draw.chance(0.5):
        verb = draw.one(vocabulary.solo)
        predicate = verb if use_plural else third_person(verb)
    else:
        predicate = f"{'are' if use_plural else 'is'} {draw.one(vocabulary.states)}"
    return sentence("the", subject, predicate, draw.one(vocabulary.places))


def _determiner(draw: Draw, vocabulary: Vocabulary, *, good: bool) -> str:
    """The farmer bought (this / *these) violin in the office."""
    is_plural = draw.chance(0.5)
    noun = _object(draw, vocabulary)
    wants_plural = is_plural == good
    determiner = draw.one(("these", "those", "several", "many") if wants_plural else ("this", "that", "one", "another"))
    verb = past(draw.one(vocabulary.actions)[0])
    noun = plural(noun) if is_plural else noun
    return sentence("the", draw.one(vocabulary.roles), verb, determiner, noun, draw.one(vocabulary.places))


def _reflexive(draw: Draw, vocabulary: Vocabulary, *, good: bool) -> str:
    """The queen hurt (herself / *himself) in the office."""
    gender = draw.below(2)
    subject = "the " + draw.one(vocabulary.kin)[gender] if draw.chance(0.6) else draw.one(vocabulary.names)[gender]
    pronoun = ("herself", "himself")[gender if good else 1 - gender]
    verb = past(draw.one(vocabulary.reflexive))
    return sentence(subject, verb, pronoun, draw.one(vocabulary.places), draw.one(vocabulary.times))


def _auxiliary(draw: Draw, vocabulary: Vocabulary, *, good: bool) -> str:
    """The farmer has (chosen / *choose) a violin in the office."""
    takes_participle = draw.chance(0.5)
    auxiliary = draw.one(("has", "had") if takes_participle else ("can", "will", "did not"))
    verb = draw.one(vocabulary.actions)[0]
    form = participle(verb) if takes_participle == good else verb
    thing = with_article(_object(draw, vocabulary))
    return sentence("the", draw.one(vocabulary.roles), auxiliary, form, thing, draw.one(vocabulary.places))


def _order(draw: Draw, vocabulary: Vocabulary, *, good: bool) -> str:
    """The farmer bought a violin in the office / *Farmer the violin a bought office in the."""
    verb = past(draw.one(vocabulary.actions)[0])
    thing = with_article(_object(draw, vocabulary))
    words = ["the", draw.one(vocabulary.roles), verb, *thing.split(), *draw.one(vocabulary.places).split()]
    if not good and draw.chance(0.3):
        first = draw.one((0, 1, 2, 3, 5))
        words[first], words[first + 1] = words[first + 1], words[first]
    elif not good:
        nouns = {words[1], words[4]}
        # Good sentences start with "the" too; no noun after it, or "the violin bought a farmer" might come out.
        middle = draw.some(words[1:5], 4)
        while middle[0] in nouns:
            middle = draw.some(words[1:5], 4)
        words = ["the", *middle, *draw.some(words[5:], 3)]
    return sentence(*words)


_PHENOMENA = (_agreement, _determiner, _reflexive, _auxiliary, _order, _order, _order, _order)


def acceptability(draw: Draw, vocabulary: Vocabulary, target: int) -> Example:
    """One sentence; class 1 is acceptable."""
    return Example(draw.one(_PHENOMENA)(draw, vocabulary, good=target == 1), label=target)


# --- sentiment. `_plain` and `_contrast` mean what their (last) adjective says, `_negated` the opposite.

_DENIALS = (
    "was not {} at all",
    "was anything but {}",
    "was far from {}",
    "was never {}",
    "was hardly {}",
    "was by no means {}",
)
_DEGREES = ("really", "truly", "rather", "quite", "simply", "very")
_FEELINGS = ("honestly", "in short", "all in all", "to my mind", "overall")


def _polar(draw: Draw, vocabulary: Vocabulary, *, good: bool) -> str:
    return draw.one(vocabulary.praise if good else vocabulary.blame)


def _topic(draw: Draw, vocabulary: Vocabulary) -> str:
    work = draw.one(vocabulary.works)
    return draw.one((f"the {work}", f"this {work}", f"the {draw.one(vocabulary.aspects)} of the {work}"))


def _plain(draw: Draw, vocabulary: Vocabulary, *, good: bool) -> str:
    first, second = draw.some(vocabulary.praise if good else vocabulary.blame, 2)
    topic, degree = _topic(draw, vocabulary), draw.one(_DEGREES)
    texts = (
        sentence(topic, "was", degree, first),
        sentence(topic, "was", first, "and", second),
        sentence(draw.one(_FEELINGS) + ",", topic, "was", degree, first),
        sentence("it was", with_article(first), draw.one(vocabulary.works), "with", with_article(second), "mood"),
    )
    return draw.one(texts)


def _contrast(draw: Draw, vocabulary: Vocabulary, *, good: bool) -> str:
    before, after = _polar(draw, vocabulary, good=not good), _polar(draw, vocabulary, good=good)
    topic = _topic(draw, vocabulary)
    texts = (
        sentence("people described it as", before + ",", "but", topic, "was", after),
        sentence("i expected something", before + ",", "but", topic, "was", draw.one(_DEGREES), after),
        sentence("although it began in a way that was", before + ",", topic, "was", after, "as a whole"),
    )
    return draw.one(texts)


def _negated(draw: Draw, vocabulary: Vocabulary, *, good: bool) -> str:
    denial = draw.one(_DENIALS).format(_polar(draw, vocabulary, good=not good))
    opening = draw.one(_FEELINGS) + "," if draw.chance(0.4) else ""
    return sentence(opening, _topic(draw, vocabulary), denial)


_OPINIONS: tuple[Callable[..., str], ...] = (_plain, _plain, _contrast, _negated)


def sentiment(draw: Draw, vocabulary: Vocabulary, target: int) -> Example:
    """One sentence of a review; class 1 is favourable."""
    return Example(draw.one(_OPINIONS)(draw, vocabulary, good=target == 1), label=target)
