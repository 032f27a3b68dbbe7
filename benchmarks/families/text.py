"""What the families whose answers are text share: prompts within the length limit, and reading answers.

Every row has one prompt and its candidate answers, each ending in the end-of-text token: so no candidate begins
another one, and their probabilities are those of saying this and nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.families.base import UNREADABLE, Model
from benchmarks.families.batch import Answers, Batch, Row, padded
from benchmarks.families.prompts import Render, Section, answers_of, base_name, gold_of, grid, sections_of
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Scoring
from benchmarks.tasks.base import Example, TaskSpec

IGNORED = -100
# Of the sequence of a timed row, the last tokens are its answer: label words have one to six.
TIMED_ANSWER = 4

Tokens = tuple[int, ...]


# ---------------------------------------------------------------------- rows


def encode_rows(  # noqa: PLR0913 - everything a row is made of
    spec: TaskSpec,
    indices: Sequence[int],
    examples: Sequence[Example],
    *,
    render: Render,
    prompt_ids: Callable[[list[str]], list[list[int]]],
    answer_ids: Callable[[str], Tokens],
    room: Callable[[Sequence[Tokens]], int],
    tokenizer: Any,
) -> tuple[Row, ...]:
    """Tokenise examples.

    Args:
        spec: the task.
        indices: their positions in the split.
        examples: to be tokenised.
        render: makes a prompt of the task's name and the example's parts.
        prompt_ids: tokenises prompts.
        answer_ids: tokenises an answer.
        room: the tokens a prompt may have beside these candidates.
        tokenizer: for cutting texts.

    Raises:
        UsageError: a prompt is too long although its passage is gone.
    """
    name = base_name(spec)
    parts = [sections_of(spec, example) for example in examples]
    encoded = prompt_ids([render(name, sections) for sections in parts])
    known: dict[tuple[str, ...], tuple[Tokens, ...]] = {}
    rows = []
    for index, example, sections, whole in zip(indices, examples, parts, encoded, strict=True):
        texts = answers_of(spec, example)
        if texts not in known:
            known[texts] = tuple(map(answer_ids, texts))
        answers = known[texts]
        limit, ids, left = room(answers), whole, sections
        while len(ids) > limit:
            shorter = _shortened(left, len(ids) - limit, tokenizer)
            if shorter is None:
                raise UsageError(
                    f"task {spec.name}, row {index}: {len(ids)} tokens without what may be cut, and max_length "
                    f"leaves {limit} for them: raise max_length"
                )
            left = shorter
            (ids,) = prompt_ids([render(name, left)])
        rows.append(Row((tuple(ids),), None, float(example.label), index, answers, gold_of(spec, example.label)))
    return tuple(rows)


def _shortened(sections: tuple[Section, ...], excess: int, tokenizer: Any) -> tuple[Section, ...] | None:
    """Take tokens from the end of the longest part that gives, not more than make it the second longest and half.

    None where nothing is left to take. To be repeated: cut texts may tokenise otherwise.
    """
    spans = {
        at: tokenizer(section.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for at, section in enumerate(sections)
        if section.gives
    }
    lengths = sorted((len(span) for span in spans.values()), reverse=True)
    if not lengths or not lengths[0]:
        return None
    if len(lengths) > 1:
        excess = min(excess, max(lengths[0] - lengths[1], math.ceil(excess / 2)))
    longest = max(spans, key=lambda at: len(spans[at]))
    kept = max(0, len(spans[longest]) - excess)
    section = sections[longest]
    cut = Section(section.caption, section.text[: spans[longest][kept][0]].rstrip() if kept else "", True)
    return (*sections[:longest], cut, *sections[longest + 1 :])


# ---------------------------------------------------------------------- answers


def label_table(rows: Sequence[Row], candidates: int | None) -> tuple[list[list[Tokens]], Tensor]:
    """The answers to be computed, candidate by candidate, and which of them exist.

    Args:
        rows: of a batch.
        candidates: how many; None for the right answers alone.

    Returns:
        ``table[candidate][row]``, where a row that lacks the candidate repeats its first one, and the mask of those
        that exist, of shape (rows, candidates).
    """
    if candidates is None:
        return [[row.right_answer[0] for row in rows]], torch.ones(len(rows), 1, dtype=torch.bool)
    table = [[row.answers[at if at < len(row.answers) else 0] for row in rows] for at in range(candidates)]
    counts = torch.tensor([len(row.answers) for row in rows])
    return table, torch.arange(candidates) < counts[:, None]


def prompts_and_answers(
    rows: Sequence[tuple[int, Row]],
    pad_token_id: int,
    candidates: int | None,
    *,
    side: Literal["right", "left"] = "right",
) -> Batch:
    """Prompts as inputs, and apart from them the answers, (candidates, rows, tokens); tokens count the prompts'."""
    ids, mask = padded([row.sequences[0] for _, row in rows], pad_token_id, side=side)
    table, valid = label_table([row for _, row in rows], candidates)
    flat, _ = padded([tokens for column in table for tokens in column], IGNORED, multiple=1)
    return Batch(
        inputs={"input_ids": ids, "attention_mask": mask},
        task_ids=torch.tensor([task for task, _ in rows]),
        groups=(),
        rows=len(rows),
        tokens=int(mask.sum()),
        padded_tokens=ids.numel(),
        answers=Answers(flat.reshape(len(table), len(rows), -1), valid, task=rows[0][0]),
    )


def most_candidates(rows: Sequence[tuple[int, Row]]) -> int:
    """Candidates of the row that has most."""
    return max(len(row.answers) for _, row in rows)


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed log-probability of the labels of every sequence: (rows, positions, words), (rows, positions) -> (rows)."""
    said = labels != IGNORED
    chosen = logits.float().log_softmax(-1).gather(-1, labels.where(said, 0).unsqueeze(-1)).squeeze(-1)
    return chosen.where(said, 0.0).sum(-1)


class TextModel(Model):
    """A language model whose answers are chosen by likelihood, or generated."""

    def __init__(self, backbone: nn.Module, specs: Sequence[TaskSpec], scoring: Scoring, tokenizer: Any) -> None:
        super().__init__(backbone, specs)
        self.scoring = scoring
        self.tokenizer = tokenizer

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of the answers' tokens, over all tokens of the batch, as transformers has it."""
        return -outputs.sum() / (_answers(batch).labels != IGNORED).sum()

    def predict(self, batch: Batch) -> Tensor:
        """Class, choice or score of every row.

        A generated text that is none of the candidates, no number or out of range is `UNREADABLE`.
        """
        spec = self.specs[_answers(batch).task]
        if self.scoring == "generate":
            return self._generated(batch, spec)
        found: Tensor = self(batch)
        if self.scoring == "likelihood_per_token":
            found = found / self.answer_lengths(batch)
        best = found.masked_fill(~_answers(batch).valid, -torch.inf).argmax(-1)
        if spec.kind != "regression":
            return best
        return torch.tensor(grid(spec), dtype=torch.float64, device=best.device)[best]

    def answer_lengths(self, batch: Batch) -> Tensor:
        """Tokens of every candidate: (rows, candidates)."""
        rows, candidates = _answers(batch).valid.shape
        lengths = (_answers(batch).labels != IGNORED).sum(-1)
        return lengths.reshape(candidates, rows).T

    def _generated(self, batch: Batch, spec: TaskSpec) -> Tensor:
        answers = _answers(batch)
        routed: AbstractContextManager[None] = (
            nullcontext() if self.attachment is None else self.attachment.route(task_ids=batch.task_ids)
        )
        with routed:
            tokens = self.backbone.generate(  # type: ignore[operator]
                **batch.inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=answers.labels.shape[-1],
                pad_token_id=self.tokenizer.pad_token_id,
            )
        if not self.backbone.config.is_encoder_decoder:  # type: ignore[union-attr]
            tokens = tokens[:, batch.inputs["input_ids"].shape[1] :]
        said = self._read(tokens)
        if spec.kind == "regression":
            return torch.tensor([_as_score(text, grid(spec)) for text in said], dtype=torch.float64)
        candidates = [
            self._read(labels.where(labels != IGNORED, self.tokenizer.pad_token_id)) for labels in answers.labels
        ]
        columns = list(zip(*candidates, strict=True))
        return torch.tensor(
            [
                float(texts[: int(valid)].index(text)) if text in texts[: int(valid)] else UNREADABLE
                for text, texts, valid in zip(said, columns, answers.valid.sum(1), strict=True)
            ]
        )

    def _read(self, tokens: Tensor) -> list[str]:
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def _as_score(text: str, scores: Sequence[float]) -> float:
    try:
        value = float("".join(text.split()))
    except ValueError:
        return UNREADABLE
    return value if scores[0] <= value <= scores[-1] else UNREADABLE


def _answers(batch: Batch) -> Answers:
    assert batch.answers is not None
    return batch.answers
