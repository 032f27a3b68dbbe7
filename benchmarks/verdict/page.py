"""The page of the verdict: questions, answers, evidence, strength; then what papers claim. Records say every number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.reporting.build import COMMAND
from benchmarks.reporting.render import Table, to_markdown
from benchmarks.verdict.claims import Ruled, rule_on_claims
from benchmarks.verdict.contest import SAME
from benchmarks.verdict.evidence import Answer, Evidence, Link, Strength
from benchmarks.verdict.questions import answer_all

PAGE = Path("docs/verdict.md")

STRENGTHS = {
    Strength.DECIDED: (
        "p below 0.05 against every other method after Holm, or equivalent within the declared band. "
        f"Differences of R2 below {SAME:g} count as none."
    ),
    Strength.PARTLY: "some methods are told apart, and the sentence says which are not.",
    Strength.UNDECIDED: "the runs do not tell the methods apart.",
    Strength.MEASURED: "every table is of one machine, which it names; ratios travel better than milliseconds.",
    Strength.NOT_RUN: "no committed run; the command makes one.",
}


def write_verdict(evidence: Evidence) -> str:
    """The page as Markdown.

    Raises:
        RecordError: a record is damaged, or one that a table needs is missing.
    """
    answers, rulings = answer_all(evidence), rule_on_claims(evidence)
    parts = [
        f"<!-- Written by `{COMMAND} --verdict`: edit nothing here. -->",
        "# The verdict: which MoE-LoRA variant?",
        "Every sentence of this page is made from the committed records.",
        summarise(answers),
        *(_answer(answer) for answer in answers),
        "## How strong is an answer",
        "\n".join(f"- **{strength}**: {meaning}" for strength, meaning in STRENGTHS.items()),
        "## What papers claim",
        _claims(rulings),
        "## What these runs cannot tell",
        "\n".join(f"- {line}" for line in _limits(evidence)),
    ]
    return "\n\n".join(parts) + "\n"


def summarise(answers: Sequence[Answer]) -> str:
    """One line per question: the first lines of the page, and a block of the README."""
    rows = [(one.question.removesuffix(": which method?"), one.choice, one.strength) for one in answers]
    # Without padding: a README has few bytes.
    return "\n".join(f"| {' | '.join(row)} |" for row in [("you have", "take", "strength"), ("---",) * 3, *rows])


def describe_answers(results: Path) -> list[dict[str, Any]]:
    """The answers as plain data, for the page of the browser."""
    return [
        {
            "question": answer.question,
            "answer": " ".join(answer.sentences).replace("`", ""),
            "strength": answer.strength.value,
            "links": [
                {"text": link.text, "folder": link.folder, "section": section_of(link.folder)}
                for link in answer.evidence
            ],
        }
        for answer in answer_all(Evidence(results))
    ]


def section_of(folder: str) -> str:
    """The section of the browser's page that has the tables of a results folder."""
    known = {"mechanisms": "#mechanisms", "tables": "#claims"}
    return known.get(folder, "#speed" if folder.startswith("speed") else "#pairs")


def _answer(answer: Answer) -> str:
    lines = [f"## {answer.question}", "\n".join(f"- {sentence}" for sentence in answer.sentences)]
    evidence = ", ".join(_link(link) for link in answer.evidence)
    lines.append(f"Strength: **{answer.strength}**." + (f" Evidence: {evidence}." if evidence else ""))
    return "\n\n".join(lines)


def _link(link: Link) -> str:
    return f"[{link.text}](../results/{link.path})"  # as seen from docs/


def _claims(rulings: Sequence[Ruled]) -> str:
    counted = {
        ruling: sum(one.ruling == ruling for one in rulings) for ruling in dict.fromkeys(r.ruling for r in rulings)
    }
    text = pd.DataFrame(
        {
            "claim": [one.claim.text for one in rulings],
            "source": [one.claim.source for one in rulings],
            "here": [one.ruling for one in rulings],
            "why": [_why(one) for one in rulings],
        }
    )
    notes = (
        f"{', '.join(f'{number} {ruling}' for ruling, number in counted.items())}, of {len(rulings)}.",
        "p-values are adjusted by Holm over all claims of this table that a test decides.",
        "Refuted here: the models and budgets of this project show the opposite. The papers' own were larger.",
        "Not reproduced: no convention of counting gives the published number.",
        "Claims and tests stand in `benchmarks/verdict/claims.toml`.",
    )
    return to_markdown(Table("claims", "Claim by claim", text, text, notes))


def _why(ruled: Ruled) -> str:
    links = ", ".join(_link(link) for link in ruled.found.evidence)
    return f"{ruled.found.words} ({links})" if links else ruled.found.words


def _largest_base(frame: pd.DataFrame) -> float:
    return float(frame.loc[frame["metric"] == "parameters.base", "value"].max())


def _limits(evidence: Evidence) -> list[str]:
    """What the runs were, so that nobody reads more out of them."""
    lines = []
    if evidence.mechanisms:
        one = next(iter(evidence.mechanisms.values()))
        teacher = one.frame.iloc[0]
        lines.append(
            f"The mechanisms are networks of width {teacher['width']} and {teacher['inner']} with Gaussian inputs. "
            "They say what a method can express and learn. They do not say how often real tasks ask for that."
        )
    for study in evidence.studies:
        protocol = study.group.protocol
        lines.append(
            f"{study.folder.name}: {protocol.backbone}, {study.steps} steps of {protocol.batch_size} rows. Longer "
            "training and larger models may order the methods otherwise."
        )
    sizes = [_largest_base(study.frame) for study in evidence.studies]
    if sizes:
        lines.append(f"The largest frozen model of these runs has {max(sizes) / 1e6:,.0f} million parameters.")
    return lines
