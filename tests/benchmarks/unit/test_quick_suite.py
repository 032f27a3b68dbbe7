"""The quick suite is what it says: deterministic, balanced, without short cuts, with held-out words."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from benchmarks.tasks.base import Example, TaskData
from benchmarks.tasks.loading import UnknownTask
from benchmarks.tasks.quick import QUICK_TASKS, VERSION, load_quick
from benchmarks.tasks.quick.grammar import (
    Event,
    active,
    double_object,
    fronted,
    participle,
    passive,
    past,
    plural,
    third_person,
    with_article,
)
from benchmarks.tasks.quick.lexicon import TRAIN, VALIDATION, Vocabulary
from benchmarks.tasks.quick.sampling import Draw, collect

ROOT = Path(__file__).resolve().parents[3]
NAMES = [spec.name for spec in QUICK_TASKS]
CLASSES = [spec.name for spec in QUICK_TASKS if spec.kind == "classification"]
PAIRS = [name for name in CLASSES if name not in {"q_cola", "q_sst2"}]
CHOICES = [spec.name for spec in QUICK_TASKS if spec.kind == "multiple_choice"]
METRICS = {
    "q_cola": "matthews",
    "q_mrpc": "accuracy_f1",
    "q_qqp": "accuracy_f1",
    "q_stsb": "pearson_spearman",
}


@pytest.fixture(scope="module")
def suite() -> dict[str, TaskData]:
    return {name: load_quick(name) for name in NAMES}


def tokens(rows: Sequence[Example]) -> set[str]:
    texts = (text for row in rows for text in (row.first, row.second or "", *row.choices))
    return {token for text in texts for token in re.findall(r"[\w-]+", text.lower())}


def inflected(vocabulary: Vocabulary) -> set[str]:
    """The content words of a half in every form a sentence may have."""
    words = set(vocabulary.words())
    verbs = {verb for pair in vocabulary.actions + vocabulary.contacts for verb in pair}
    verbs |= {*vocabulary.gifts, *vocabulary.solo, *vocabulary.reflexive, *vocabulary.factive, *vocabulary.opinion}
    verbs |= {*vocabulary.achieving, *vocabulary.attempting}
    members = [noun for kind in vocabulary.things.values() for noun in kind]
    nouns = {*vocabulary.roles, *vocabulary.things, *members}
    words |= {form(verb) for verb in verbs for form in (past, participle, third_person)}
    return words | {plural(noun) for noun in nouns}


# --- content and form


def test_names_kinds_and_metrics() -> None:
    namesakes = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
    namesakes += ["boolq", "openbookqa", "arc_easy", "arc_challenge"]
    assert [f"q_{name}" for name in namesakes] == NAMES
    for spec in QUICK_TASKS:
        assert spec.metric == METRICS.get(spec.name, "accuracy")
        assert spec.truncate == ("only_second" if spec.name == "q_boolq" else "longest_first")
        assert spec.label_range == ((0.0, 5.0) if spec.name == "q_stsb" else None)
    assert {spec.name: spec.labels for spec in QUICK_TASKS}["q_boolq"] == ("no", "yes")


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_well_formed(suite: dict[str, TaskData], name: str) -> None:
    data = suite[name]
    assert (len(data.train), len(data.validation)) == (2000, 300)
    for row in (*data.train, *data.validation):
        assert (row.second is None) == (data.spec.kind == "multiple_choice" or name in {"q_cola", "q_sst2"})
        assert bool(row.choices) == (data.spec.kind == "multiple_choice")
        for text in (row.first, row.second or "x.", *row.choices):
            assert text == text.strip()
            assert "  " not in text
            assert "{" not in text
        if row.choices:
            assert 3 <= len(row.choices) == len(set(row.choices)) <= 5
            assert 0 <= row.label < len(row.choices)
        elif data.spec.label_range:
            assert 0.0 <= row.label <= 5.0
        else:
            assert row.label in range(len(data.spec.labels))
            assert row.first != row.second


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_short(suite: dict[str, TaskData], name: str) -> None:
    longest = 60 if name == "q_boolq" else 40
    for row in (*suite[name].train, *suite[name].validation):
        for text in (row.first, row.second or "", *row.choices):
            assert len(re.findall(r"\w+|[^\w\s]", text)) <= longest


@pytest.mark.parametrize("name", NAMES)
def test_no_row_occurs_twice(suite: dict[str, TaskData], name: str) -> None:
    rows = [(row.first, row.second, frozenset(row.choices)) for row in (*suite[name].train, *suite[name].validation)]
    assert len(set(rows)) == len(rows)


# --- held-out words


def test_the_halves_of_the_lexicon_share_no_form_of_a_content_word() -> None:
    assert len(TRAIN.words()) > 300
    assert len(VALIDATION.words()) > 300
    assert inflected(TRAIN) & inflected(VALIDATION) == set()


@pytest.mark.parametrize("name", NAMES)
def test_validation_uses_no_content_word_of_train(suite: dict[str, TaskData], name: str) -> None:
    train, validation = tokens(suite[name].train), tokens(suite[name].validation)
    shared = train & validation
    assert shared & (inflected(TRAIN) | inflected(VALIDATION)) == set()
    assert validation & inflected(TRAIN) == set()
    assert train & inflected(VALIDATION) == set()
    # What is left are function words and the fixed words of the frames: few, and most words are not among them.
    assert len(shared) < 100
    assert len(validation - shared) > len(shared) / 2


# --- balance


@pytest.mark.parametrize("name", CLASSES)
def test_labels_are_balanced(suite: dict[str, TaskData], name: str) -> None:
    for rows in (suite[name].train, suite[name].validation, suite[name].train[:300]):
        counts = Counter(row.label for row in rows)
        assert set(counts) == set(range(len(suite[name].spec.labels)))
        assert max(counts.values()) - min(counts.values()) <= 0.02 * len(rows)


@pytest.mark.parametrize("name", CHOICES)
def test_place_of_the_right_choice_is_uniform(suite: dict[str, TaskData], name: str) -> None:
    for rows in (suite[name].train, suite[name].validation):
        counts = Counter((len(row.choices), row.label) for row in rows)
        for size, cells in itertools.groupby(sorted(counts), key=lambda cell: cell[0]):
            found = [counts[cell] for cell in cells]
            assert len(found) == size
            assert max(found) - min(found) <= 0.02 * len(rows)


def test_scores_of_similarity_cover_the_range(suite: dict[str, TaskData]) -> None:
    for rows in (suite["q_stsb"].train, suite["q_stsb"].validation):
        counts, _ = np.histogram([row.label for row in rows], bins=5, range=(0, 5))
        assert counts.min() > 0.1 * len(rows)
        assert counts.max() < 0.3 * len(rows)


# --- short cuts


def bag_of_words_accuracy(
    train: Sequence[Example], test: Sequence[Example], parts: Sequence[Callable[[Example], str]]
) -> float:
    """Accuracy on `test` of a linear classifier that sees which words occur in each part."""
    columns = []
    for part in parts:
        vectorizer = CountVectorizer(token_pattern=r"[\w-]+")
        columns.append((vectorizer.fit_transform(map(part, train)), vectorizer.transform(map(part, test))))
    fitted, held_out = (csr_matrix(hstack(side)) for side in zip(*columns, strict=True))
    model = LogisticRegression(max_iter=1000).fit(fitted, [row.label for row in train])
    return float(model.score(held_out, [row.label for row in test]))


def first_part(row: Example) -> str:
    return row.first


def second_part(row: Example) -> str:
    return row.second or ""


@pytest.mark.parametrize("name", ["q_cola", *PAIRS])
@pytest.mark.parametrize("split", ["validation", "train"])
def test_single_words_do_not_give_the_label_away(suite: dict[str, TaskData], name: str, split: str) -> None:
    data = suite[name]
    fitted, held_out = (
        (data.train, data.validation) if split == "validation" else (data.train[:1000], data.train[1000:])
    )
    parts = [first_part] if name == "q_cola" else [first_part, second_part]
    chance = 1 / len(data.spec.labels)
    # Within train the verbs that decide an entailment ("knew", "believed") are seen: that is content, not a leak.
    assert bag_of_words_accuracy(fitted, held_out, parts) < chance + 0.2


@pytest.mark.parametrize("name", PAIRS)
def test_the_second_sentence_alone_says_little(suite: dict[str, TaskData], name: str) -> None:
    data = suite[name]
    accuracy = bag_of_words_accuracy(data.train[:1000], data.train[1000:], [second_part])
    assert accuracy < 1 / len(data.spec.labels) + 0.1


def test_the_probe_finds_a_leak_where_there_is_one(suite: dict[str, TaskData]) -> None:
    rows = [
        Example(row.first, f"{row.second} {'surely' * int(row.label)}", (), row.label) for row in suite["q_rte"].train
    ]
    assert bag_of_words_accuracy(rows[:1000], rows[1000:], [first_part, second_part]) > 0.95


def test_sentiment_is_not_decided_by_frames(suite: dict[str, TaskData]) -> None:
    data = suite["q_sst2"]
    assert bag_of_words_accuracy(data.train, data.validation, [first_part]) < 0.6


@pytest.mark.parametrize("name", CLASSES)
def test_length_does_not_give_the_label_away(suite: dict[str, TaskData], name: str) -> None:
    rows = suite[name].train
    lengths = np.array([[len(text), len(text.split())] for row in rows for text in [f"{row.first} {row.second}"]])
    labels = [row.label for row in rows]
    standardised = (lengths - lengths.mean(0)) / lengths.std(0)
    accuracy = LogisticRegression().fit(standardised, labels).score(standardised, labels)
    assert accuracy < 1 / len(suite[name].spec.labels) + 0.1


@pytest.mark.parametrize("name", CHOICES)
def test_choices_without_the_question_say_little(suite: dict[str, TaskData], name: str) -> None:
    train, test = suite[name].train[:1000], suite[name].train[1000:]
    vectorizer = CountVectorizer(token_pattern=r".+")
    features = vectorizer.fit_transform([choice for row in train for choice in row.choices])
    is_right = [place == row.label for row in train for place, _ in enumerate(row.choices)]
    model = LogisticRegression(max_iter=1000).fit(features, is_right)
    best = [int(model.decision_function(vectorizer.transform(row.choices)).argmax()) for row in test]
    chance = np.mean([1 / len(row.choices) for row in test])
    assert np.mean([place == row.label for place, row in zip(best, test, strict=True)]) < chance + 0.07
    longest = [int(np.argmax([len(choice) for choice in row.choices])) for row in test]
    assert np.mean([place == row.label for place, row in zip(longest, test, strict=True)]) < chance + 0.07


# --- determinism


def test_fingerprint_covers_version_task_and_all_rows(suite: dict[str, TaskData]) -> None:
    data = suite["q_stsb"]
    content = {
        "version": VERSION,
        "task": "q_stsb",
        "train": [astuple(row) for row in data.train],
        "validation": [astuple(row) for row in data.validation],
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert data.fingerprint == hashlib.sha256(text.encode()).hexdigest()
    assert len({task.fingerprint for task in suite.values()}) == len(NAMES)
    assert data.source == (
        "generated by moepeft benchmarks (quick suite, version 1), 2,000 train and 300 validation rows"
    )


@pytest.mark.slow
def test_another_process_with_another_hash_seed_makes_the_same_rows(suite: dict[str, TaskData]) -> None:
    program = (
        "from benchmarks.tasks.quick import QUICK_TASKS, load_quick\n"
        "for spec in QUICK_TASKS: print(load_quick(spec.name).fingerprint)"
    )
    command = [sys.executable, "-c", program]
    environment = {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert done.stdout.split() == [suite[name].fingerprint for name in NAMES]


def test_fewer_rows_are_a_prefix(suite: dict[str, TaskData]) -> None:
    for name in NAMES:
        small = load_quick(name, train_rows=50, validation_rows=20)
        assert small.train == suite[name].train[:50]
        assert small.validation == suite[name].validation[:20]


def test_unknown_names_and_impossible_sizes_are_refused() -> None:
    with pytest.raises(UnknownTask, match="q_rte"):
        load_quick("q_rt")

    def constant(draw: Draw, vocabulary: Vocabulary, target: int) -> Example:
        return Example("The same sentence.", label=target)

    with pytest.raises(ValueError, match="after 1 rows"):
        collect(constant, TRAIN, key="k", rows=2, targets=1)


# --- grammar, against hand-written English


@pytest.mark.parametrize(
    ("verb", "forms"),
    [
        ("cry", ("cries", "cried", "cried")),
        ("push", ("pushes", "pushed", "pushed")),
        ("hug", ("hugs", "hugged", "hugged")),
        ("annoy", ("annoys", "annoyed", "annoyed")),
        ("hide", ("hides", "hid", "hidden")),
        ("draw", ("draws", "drew", "drawn")),
        ("choose", ("chooses", "chose", "chosen")),
        ("display", ("displays", "displayed", "displayed")),
        ("question", ("questions", "questioned", "questioned")),
    ],
)
def test_verb_forms(verb: str, forms: tuple[str, str, str]) -> None:
    assert (third_person(verb), past(verb), participle(verb)) == forms


def test_noun_forms() -> None:
    forms = [plural(noun) for noun in ("box", "lily", "bus", "fish", "toy", "moth", "peach", "cherry")]
    assert forms == ["boxes", "lilies", "buses", "fish", "toys", "moths", "peaches", "cherries"]
    assert [with_article(noun) for noun in ("apple", "violin", "old violin")] == [
        "an apple",
        "a violin",
        "an old violin",
    ]


def test_clauses() -> None:
    event = Event("the doctor", "give", "two violins", True, "Anna", "in the office", "at noon")
    assert active(event) == "The doctor gave two violins to Anna in the office at noon."
    assert double_object(event) == "The doctor gave Anna two violins in the office at noon."
    assert passive(event) == "Two violins were given to Anna by the doctor in the office at noon."
    assert fronted(event) == "In the office, the doctor gave two violins to Anna at noon."
    denied = Event("the doctor", "hide", "a violin", mood="negated")
    assert (active(denied), passive(denied)) == (
        "The doctor did not hide a violin.",
        "A violin was not hidden by the doctor.",
    )
    possible = Event("the doctor", "hide", "a violin", mood="possible")
    assert (active(possible), passive(possible)) == (
        "The doctor may have hidden a violin.",
        "A violin may have been hidden by the doctor.",
    )
