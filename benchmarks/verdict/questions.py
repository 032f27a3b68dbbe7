"""The seven questions that people ask, each answered from records alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

from benchmarks.mechanisms.tables import BOUND, interval, multiplier, p_of_zero
from benchmarks.reporting.views import is_baseline
from benchmarks.verdict.contest import find_best
from benchmarks.verdict.evidence import (
    Answer,
    Evidence,
    Link,
    Mechanism,
    Strength,
    Study,
    merges,
    ratio_column,
)


def answer_all(evidence: Evidence) -> list[Answer]:
    """All seven, in the order of the page."""
    contradicting, *others = (question.answer(evidence) for question in QUESTIONS)
    studies = [study for study in _compared(evidence) if study.contradicts]
    return [
        answer_related(evidence),
        _with_studies(_with_structures(contradicting, evidence), studies),
        *others,
        answer_fastest(evidence),
    ]


# ---------------------------------------------------------------------- the suites


def answer_related(evidence: Evidence) -> Answer:
    """Tasks that have much in common, as those of a suite."""
    question = "Several related tasks, trained together: which method?"
    studies = [study for study in _compared(evidence) if not study.contradicts]
    if not studies:
        return _not_run(question, "python -m benchmarks.run --suite glue --data-dir DATA")
    verdicts = pd.concat([_trained(study)["verdict"] for study in studies])
    decided = verdicts.isin(["better", "worse", "equivalent"])
    strength = Strength.DECIDED if decided.all() else Strength.PARTLY if decided.any() else Strength.UNDECIDED
    sentences = tuple(_tell_study(study) for study in studies)
    links = tuple(_link_study(study, "comparison") for study in studies)
    return Answer(question, _choose_related(studies[0]), sentences, links, strength)


def _compared(evidence: Evidence) -> list[Study]:
    return [study for study in evidence.studies if study.compared is not None and study.group.tuned is not None]


def _with_studies(answer: Answer, studies: Sequence[Study]) -> Answer:
    """The answer of an experiment, and what runs on real text say."""
    return replace(
        answer,
        sentences=(*answer.sentences, *map(_tell_study, studies)),
        evidence=(*answer.evidence, *(_link_study(study, "comparison") for study in studies)),
    )


def _with_structures(answer: Answer, evidence: Evidence) -> Answer:
    """The answer, and who is best at each kind of update: some methods are made for one."""
    found = evidence.mechanisms.get("structures")
    if found is None:
        return answer
    kinds = dict.fromkeys(found.frame["structure"])
    told = "; ".join(f"{kind}: {find_best(_contest(found, structure=kind)).choice}" for kind in kinds)
    shared = ", ".join(f"{field} {value}" for field, value in found.asked.experiment.teacher.items())
    sentence = f"Best by the kind of update that tasks ask for, at {shared}: {told}."
    return replace(answer, sentences=(*answer.sentences, sentence), evidence=(*answer.evidence, _link(found, "scores")))


def _choose_related(study: Study) -> str:
    """What the longest runs say: what is better than the reference, else what is as good."""
    rows = _trained(study)
    better, equivalent = (rows[rows["verdict"] == word]["method"].tolist() for word in ("better", "equivalent"))
    if better:
        return ", ".join(better)
    as_good = f"as good: {', '.join(equivalent)}" if equivalent else "none is decided to be better"
    return f"{study.reference} ({as_good})"


def _trained(study: Study) -> pd.DataFrame:
    assert study.compared is not None
    methods = study.frame.drop_duplicates("label").set_index("label")["method"]
    return study.compared[~study.compared["method"].map(methods).map(is_baseline)]


def _tell_study(study: Study) -> str:
    """What a comparison with the reference decided, in one sentence."""
    rows = _trained(study)
    parts = []
    for word in ("better", "worse", "equivalent"):
        some = rows[rows["verdict"] == word]
        if len(some):
            parts.append(f"{word}: {', '.join(_tell_difference(row) for _, row in some.iterrows())}")
    left = rows[~rows["verdict"].isin(["better", "worse", "equivalent"])]
    for verdict, some in left.groupby("verdict", sort=False):
        parts.append(f"{verdict}: {', '.join(_tell_difference(row) for _, row in some.iterrows())}")
    seeds = int(rows["seeds"].max()) if len(rows) else 0
    where = f"{study.folder.name}, {study.steps} steps, {seeds} seed{'s' if seeds != 1 else ''}"
    return f"{where}, beside {study.reference}: {'; '.join(parts) or 'nothing is compared'}."


def _tell_difference(row: pd.Series) -> str:
    return f"{row['method']} ({100 * row['difference']:+z.1f} ± {100 * row['half_width']:.1f} points)"


# ---------------------------------------------------------------------- the mechanisms


def answer_contradicting(question: str, found: Mechanism) -> Answer:
    """Tasks whose answers to the same input differ."""
    return _answer_teacher(question, found, "conflict", max(found.frame["conflict"]))


def answer_many(question: str, found: Mechanism) -> Answer:
    """Dozens of tasks."""
    most, few = max(found.frame["tasks"]), min(found.frame["tasks"])
    answer = _answer_teacher(question, found, "tasks", most)
    best = find_best(_contest(found, tasks=most)).best
    return replace(
        answer, sentences=(*answer.sentences, f"At {few} tasks {best} explains {_score(found, best, tasks=few)}.")
    )


def answer_without_ids(question: str, found: Mechanism) -> Answer:
    """No one says at inference which task a row is of."""
    deaf = [name for name in found.deaf() if name != found.oracle]
    if not deaf:
        told = ("All methods of these runs need ids.",)
        return Answer(question, "none", told, (_link(found, "swap-loss"),), Strength.DECIDED)
    low, high = min(found.frame["conflict"]), max(found.frame["conflict"])
    rows = _contest(found, conflict=low)
    contest = find_best(rows[rows["method"].isin(deaf)])
    sentences = (
        f"{', '.join(deaf)} need no ids: wrong ids change none of their answers.",
        (
            f"Where all tasks ask for one update, {contest.best} explains most of these, "
            f"{_score(found, contest.best, conflict=low)}, {contest.words}."
        ),
        (
            f"Where tasks contradict each other, no method can do without ids: the {BOUND} explains "
            f"{_shown(found.at(conflict=high)['bound'])}."
        ),
    )
    links = (_link(found, "swap-loss"), _link(found, "scores"))
    return Answer(question, contest.choice, sentences, links, contest.strength)


def answer_merged(question: str, found: Mechanism) -> Answer:
    """The adapter must be folded into the weights."""
    high = max(found.frame["conflict"])
    rows = _contest(found, conflict=high)
    names = [str(name) for name in rows["method"].unique()]
    folding = [name for name in names if merges(name)]
    contest = find_best(rows[rows["method"].isin(folding)])
    sentences = (
        f"{', '.join(name for name in names if name not in folding) or 'No method'} cannot be merged.",
        (
            f"Of those that can, {contest.best} explains most of tasks that contradict each other, "
            f"{_score(found, contest.best, conflict=high)}, {contest.words}."
        ),
        "On related tasks the first answer holds, without those that cannot.",
    )
    links = (_link(found, "scores"), _link(found, "pairs"))
    return Answer(question, contest.choice, sentences, links, contest.strength)


def answer_smallest(question: str, found: Mechanism) -> Answer:
    """As few parameters as possible at the reference's score."""
    experiment = found.asked.experiment
    rank = experiment.ranks_of_reference[len(experiment.ranks_of_reference) // 2]
    sentences, p_values, leaders = [], [], []
    (field,) = experiment.vary
    for value in experiment.vary[field]:
        rows = found.at(**{field: value})
        told = []
        for name in [name for name in rows["method"].unique() if name != experiment.reference]:
            logs = [
                multiplier(rows[rows["seed"] == seed], experiment.reference, str(name), rank)
                for seed in experiment.seeds
            ]
            finite = [log for log in logs if np.isfinite(log)]
            if len(finite) < max(2, len(logs) / 2):
                continue
            mean, half = interval(finite)
            p_values.append(p_of_zero(finite))
            if mean > 0:
                low, high = np.exp(mean - half), np.exp(mean + half)
                told.append((mean, f"{name} {np.exp(mean):.2g} times fewer ({low:.2g} to {high:.2g})"))
        leaders += [text.partition(" ")[0] for _, text in sorted(told, reverse=True)[:1]]
        best = "; ".join(text for _, text in sorted(told, reverse=True)) or "no method needs fewer"
        sentences.append(f"{field} {value:g}, for the score of {experiment.reference} at rank {rank}: {best}.")
    sentences.append(f"Each method is compared with {experiment.reference} alone, where it reaches the score.")
    decided = multipletests(p_values, method="holm")[0] if p_values else np.zeros(1, dtype=bool)
    strength = Strength.DECIDED if decided.all() else Strength.PARTLY if decided.any() else Strength.UNDECIDED
    choice = ", ".join(dict.fromkeys(leaders)) or f"none needs fewer than {experiment.reference}"
    return Answer(question, choice, tuple(sentences), (_link(found, "multipliers"),), strength)


# ---------------------------------------------------------------------- speed


def answer_fastest(evidence: Evidence) -> Answer:
    """The shortest training step: whoever is first in a table, and in how many, as shapes and devices differ."""
    question = "Fastest to train: which method?"
    tables = [
        table for table in evidence.speed if "Training step" in table["title"] and ratio_column(table) is not None
    ]
    if not tables:
        return _not_run(question, "python -m benchmarks.speed --backbone minilm --methods all --mode train")
    sentences, links, fastest = [], [], []
    for table in tables:
        rows = pd.DataFrame(table["rows"], columns=table["columns"])
        ratio = str(ratio_column(table))
        own = rows[~rows["contestant"].str.contains("frozen|peft")]
        known = own.assign(number=own[ratio].str.extract(r"([\d.]+)", expand=False).astype(float))
        known = known.dropna(subset=["number"]).sort_values("number")
        fastest.append(str(known["contestant"].iloc[0]))
        told = ", ".join(f"{row['contestant']} {row[ratio]}" for _, row in known.iterrows())
        sentences.append(f"{table['title']}, {ratio.removeprefix('x ')} as 1: {told}.")
        links.append(evidence.link(table))
    sentences += ["In brackets: in how many tables the method is first.", *(f"{one.words}." for one in evidence.merged)]
    links += [one.link for one in evidence.merged]
    choice = ", ".join(f"{name} ({times} of {len(tables)})" for name, times in Counter(fastest).most_common())
    return Answer(question, choice, tuple(sentences), tuple(dict.fromkeys(links)), Strength.MEASURED)


@dataclass(frozen=True)
class Question:
    """One that an experiment answers.

    Attributes:
        text: as people ask it.
        experiment: of the mechanisms.
        ask: answers from the experiment's runs.
    """

    text: str
    experiment: str
    ask: Callable[[str, Mechanism], Answer]

    def answer(self, evidence: Evidence) -> Answer:
        """The answer, or the command that makes its runs."""
        found = evidence.mechanisms.get(self.experiment)
        if found is None:
            return _not_run(self.text, f"python -m benchmarks.run --suite mechanisms --tasks {self.experiment}")
        return self.ask(self.text, found)


QUESTIONS = (
    Question("Tasks that contradict each other: which method?", "conflict", answer_contradicting),
    Question("Many tasks: which method?", "tasks", answer_many),
    Question("No task ids at inference: which method?", "conflict", answer_without_ids),
    Question("The adapter must be merged: which method?", "conflict", answer_merged),
    Question("Fewest parameters at an equal score: which method?", "sizes", answer_smallest),
)


# ---------------------------------------------------------------------- words


def _answer_teacher(question: str, found: Mechanism, field: str, value: float) -> Answer:
    """The best method on one teacher, beside the bound and the reference."""
    rows = _contest(found, **{field: value})
    contest, reference = find_best(rows), found.asked.experiment.reference
    sentences = [
        (
            f"At {field} {value:g}, {contest.best} explains {_score(found, contest.best, **{field: value})}, "
            f"{contest.words}."
        ),
        f"The {BOUND} explains R2 {_shown(rows['bound'])}.",
        f"The oracle, {found.oracle}, explains {_score(found, found.oracle, **{field: value})}.",
    ]
    if contest.best != reference:
        sentences.append(f"{reference} explains {_score(found, reference, **{field: value})}.")
    links = (_link(found, "scores"), _link(found, "pairs"))
    return Answer(question, contest.choice, tuple(sentences), links, contest.strength)


def _contest(found: Mechanism, **where: float) -> pd.DataFrame:
    """The rows of one teacher, without the oracle: it shares nothing, so that it is no answer."""
    rows = found.at(**where)
    return rows[rows["method"] != found.oracle]


def _score(found: Mechanism, method: str | None, **where: float) -> str:
    rows = found.at(**where)
    return f"R2 {_shown(rows[rows['method'] == method]['score'])}"


def _shown(values: pd.Series) -> str:
    known = values.dropna().tolist()
    if not known:
        return "unknown"
    mean, half = interval(known)
    return f"{mean:.2f}" if np.isnan(half) or half < 0.005 else f"{mean:.2f} ± {half:.2f}"


def _link(found: Mechanism, table: str) -> Link:
    name = f"{found.asked.experiment.name}-{table}"
    return Link(name, f"mechanisms/tables/{name}.md")


def _link_study(study: Study, table: str) -> Link:
    return Link(study.folder.name, f"{study.folder.name}/tables/{table}.md")


def _not_run(question: str, command: str) -> Answer:
    return Answer(question, "not run", (f"Not run yet: `{command}`.",), (), Strength.NOT_RUN)
