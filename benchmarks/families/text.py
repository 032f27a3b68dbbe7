"""What the families whose answers are text share: prompts within the length limit, and reading answers.

Every row has one prompt and its candidate answers, each ending in the end-of-text token: so no candidate begins
another one, and their probabilities are those of saying this and nothing more. Cloze answers alone have no end.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.families.base import UNREADABLE, Answers, Family, Model, require_numbers
from benchmarks.families.batch import TextBatch, TextRow, Tokens, padded
from benchmarks.families.prompts import Section, answers_of, gold_of, grid, sections_of, task_title
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Scoring
from benchmarks.tasks.base import Example, TaskSpec

IGNORED = -100
# Of the sequence of a timed row, the last tokens are its answer: label words have one to six.
TIMED_ANSWER = 4


# ---------------------------------------------------------------------- rows


class TextFamily(Family[TextRow, TextBatch]):
    """A family whose answers are text. A subclass says how prompts and answers become tokens."""

    has_heads = False

    @abstractmethod
    def prompt(self, name: str, sections: Sequence[Section]) -> str:
        """The prompt, from the task's name and the example's parts."""

    @abstractmethod
    def prompt_ids(self, texts: list[str]) -> list[list[int]]:
        """The tokens of prompts."""

    @abstractmethod
    def answer_ids(self, text: str) -> Tokens:
        """The tokens of an answer and its end."""

    @abstractmethod
    def room(self, answers: Sequence[Tokens]) -> int:
        """The tokens that a prompt may have beside these candidates."""

    def encode(self, spec: TaskSpec, indices: Sequence[int], examples: Sequence[Example]) -> tuple[TextRow, ...]:
        """Rows of one prompt and its candidate answers, which are never cut.

        Raises:
            UsageError: a prompt is too long although its passage is gone.
        """
        name = task_title(spec)
        listed = self.protocol.prompt == "listed"
        parts = [sections_of(spec, example, listed=listed) for example in examples]
        encoded = self.prompt_ids([self.prompt(name, sections) for sections in parts])
        known: dict[tuple[str, ...], tuple[Tokens, ...]] = {}
        rows = []
        for index, example, sections, ids in zip(indices, examples, parts, encoded, strict=True):
            texts = answers_of(spec, example)
            if texts not in known:
                known[texts] = tuple(map(self.answer_ids, texts))
            answers = known[texts]
            rows.append(
                TextRow(
                    prompt=self._fit(spec, index, sections, ids, self.room(answers)),
                    answers=answers,
                    gold=gold_of(spec, example.label),
                    label=float(example.label),
                    index=index,
                )
            )
        return tuple(rows)

    def _fit(self, spec: TaskSpec, index: int, sections: tuple[Section, ...], ids: list[int], limit: int) -> Tokens:
        """The tokens of a prompt, shortened until the limit is kept."""
        while len(ids) > limit:
            shorter = _shortened(sections, len(ids) - limit, self.tokenizer)
            if shorter is None:
                raise UsageError(
                    f"task {spec.name}, row {index}: {len(ids)} tokens without what may be cut, and max_length "
                    f"leaves {limit} for them: raise max_length"
                )
            sections = shorter
            (ids,) = self.prompt_ids([self.prompt(task_title(spec), sections)])
        return tuple(ids)


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


def label_table(rows: Sequence[TextRow], candidates: int | None) -> tuple[list[list[Tokens]], Tensor]:
    """The answers to be computed, candidate by candidate, and which of them exist.

    Args:
        rows: of a batch.
        candidates: how many; None for the right answers alone.

    Returns:
        ``table[candidate][row]``, where a row that lacks the candidate repeats its first one, and the mask of those
        that exist, of shape (rows, candidates).
    """
    if candidates is None:
        return [[row.right_answer for row in rows]], torch.ones(len(rows), 1, dtype=torch.bool)
    table = [[row.answers[at if at < len(row.answers) else 0] for row in rows] for at in range(candidates)]
    counts = torch.tensor([len(row.answers) for row in rows])
    return table, torch.arange(candidates) < counts[:, None]


def prompts_and_answers(
    rows: Sequence[tuple[int, TextRow]],
    pad_token_id: int,
    candidates: int | None,
    *,
    side: Literal["right", "left"] = "right",
) -> TextBatch:
    """Prompts as inputs, and apart from them the answers, (candidates, rows, tokens); tokens count the prompts'."""
    ids, mask = padded([row.prompt for _, row in rows], pad_token_id, side=side)
    table, valid = label_table([row for _, row in rows], candidates)
    flat, _ = padded([tokens for column in table for tokens in column], IGNORED, multiple=1)
    tasks = tuple(task for task, _ in rows)
    return TextBatch(
        inputs={"input_ids": ids, "attention_mask": mask},
        task_ids=torch.tensor(tasks),
        rows=len(rows),
        tokens=int(mask.sum()),
        padded_tokens=ids.numel(),
        labels=flat.reshape(len(table), len(rows), -1),
        valid=valid,
        tasks=tasks,
    )


def most_candidates(rows: Sequence[tuple[int, TextRow]]) -> int:
    """Candidates of the row that has most."""
    return max(len(row.answers) for _, row in rows)


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed log-probability of the labels of every sequence: (rows, positions, words), (rows, positions) -> (rows)."""
    said = labels != IGNORED
    chosen = logits.float().log_softmax(-1).gather(-1, labels.where(said, 0).unsqueeze(-1)).squeeze(-1)
    return chosen.where(said, 0.0).sum(-1)


class TextModel(Model[TextBatch]):
    """A language model whose answers are chosen by likelihood, or generated."""

    def __init__(self, backbone: nn.Module, specs: Sequence[TaskSpec], scoring: Scoring, tokenizer: Any) -> None:
        super().__init__(backbone, specs)
        self.scoring = scoring
        self.tokenizer = tokenizer

    def loss(self, outputs: Tensor, batch: TextBatch) -> Tensor:
        """Mean cross-entropy of the answers' tokens, over all tokens of the batch, as transformers has it."""
        return -outputs.sum() / (batch.labels != IGNORED).sum()

    def predict(self, batch: TextBatch) -> Answers:
        """Class, choice or score of every row, and the share of every candidate in the probability of all of them.

        A generated text that is none of the candidates, no number or out of range is `UNREADABLE`.
        """
        spec = self.specs[batch.tasks[0]]
        if self.scoring == "generate":
            return Answers(self._generated(batch, spec))
        found: Tensor = self(batch)
        if self.scoring == "likelihood_per_token":
            found = found / self.answer_lengths(batch)
        require_numbers(found.masked_fill(~batch.valid, 0.0), spec)
        found = found.masked_fill(~batch.valid, -torch.inf)
        best = found.argmax(-1)
        if spec.kind != "regression":
            return Answers(best, found.log_softmax(-1))
        return Answers(torch.tensor(grid(spec), dtype=torch.float64, device=best.device)[best])

    def answer_lengths(self, batch: TextBatch) -> Tensor:
        """Tokens of every candidate: (rows, candidates)."""
        rows, candidates = batch.valid.shape
        lengths = (batch.labels != IGNORED).sum(-1)
        return lengths.reshape(candidates, rows).T

    def _generated(self, batch: TextBatch, spec: TaskSpec) -> Tensor:
        routed: AbstractContextManager[None] = (
            nullcontext() if self.attachment is None else self.attachment.route(task_ids=batch.task_ids)
        )
        with routed:
            generated = self.backbone.generate(  # type: ignore[operator]
                **batch.inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=batch.labels.shape[-1],
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_logits=True,
            )
        # Greedy decoding takes the highest logit; of those that are no numbers it would be the first.
        require_numbers(torch.stack(generated.logits).amax(-1).T, spec)
        tokens = generated.sequences
        if not self.backbone.config.is_encoder_decoder:  # type: ignore[union-attr]
            tokens = tokens[:, batch.inputs["input_ids"].shape[1] :]
        said = self._read(tokens)
        if spec.kind == "regression":
            return torch.tensor([_as_score(text, grid(spec)) for text in said], dtype=torch.float64)
        candidates = [
            self._read(labels.where(labels != IGNORED, self.tokenizer.pad_token_id)) for labels in batch.labels
        ]
        columns = list(zip(*candidates, strict=True))
        return torch.tensor(
            [
                float(texts[: int(valid)].index(text)) if text in texts[: int(valid)] else UNREADABLE
                for text, texts, valid in zip(said, columns, batch.valid.sum(1), strict=True)
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
