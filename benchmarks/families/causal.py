"""Text with a decoder-only model: the answer goes on where the prompt ends, and only its tokens are trained on."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.backbones.load import BackboneSource, load_backbone
from benchmarks.families.batch import Answers, Batch, Row, padded
from benchmarks.families.prompts import ANSWER_CUE, to_be_continued
from benchmarks.families.text import (
    IGNORED,
    TIMED_ANSWER,
    TextModel,
    Tokens,
    encode_rows,
    label_table,
    log_probabilities,
    most_candidates,
    prompts_and_answers,
)
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Protocol, Scoring
from benchmarks.tasks.base import Example, TaskSpec


@dataclass(frozen=True)
class Causal:
    """The family of decoder-only models; see `benchmarks.families.base.Family`.

    Attributes:
        scoring: how an answer is chosen.
        padding_side: of sequences with answers; scores do not depend on it. Prompts to be continued are padded on
            the left in any case.
    """

    scoring: Scoring = "likelihood"
    padding_side: Literal["right", "left"] = "right"
    has_heads = False

    def encode(
        self, spec: TaskSpec, indices: Sequence[int], examples: Sequence[Example], tokenizer: Any, max_length: int
    ) -> tuple[Row, ...]:
        """Rows of one prompt that has at most `max_length` tokens together with the longest of its answers."""

        def prompt_ids(texts: list[str]) -> list[list[int]]:
            found: list[list[int]] = tokenizer(texts, add_special_tokens=True)["input_ids"]
            # Some tokenizers end every text: a prompt is no end.
            return [ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids for ids in found]

        def answer_ids(text: str) -> Tokens:
            return _continuation(text, tokenizer)

        return encode_rows(
            spec,
            indices,
            examples,
            render=to_be_continued,
            prompt_ids=prompt_ids,
            answer_ids=answer_ids,
            room=lambda answers: max_length - max(map(len, answers)),
            tokenizer=tokenizer,
        )

    def training_batch(self, rows: Sequence[tuple[int, Row]], specs: Sequence[TaskSpec], pad_token_id: int) -> Batch:
        """Every prompt with its right answer."""
        return self._with_answers(rows, pad_token_id, None)

    def scoring_batch(self, rows: Sequence[tuple[int, Row]], specs: Sequence[TaskSpec], pad_token_id: int) -> Batch:
        """Every prompt with each of its candidates; to generate, the prompts alone."""
        if self.scoring == "generate":
            return prompts_and_answers(rows, pad_token_id, most_candidates(rows), side="left")
        return self._with_answers(rows, pad_token_id, most_candidates(rows))

    def timing_row(self, ids: tuple[int, ...], *, segments: bool) -> Row:
        """A sequence of these tokens, of which the last few are the answer."""
        return Row((ids[:-TIMED_ANSWER],), None, 0.0, 0, (ids[-TIMED_ANSWER:],))

    def load(
        self, source: BackboneSource, specs: Sequence[TaskSpec], protocol: Protocol, seed: int, tokenizer: Any
    ) -> TextModel:
        """The frozen model."""
        backbone = load_backbone(source, "causal", dropout=protocol.dropout, dtype=protocol.base_dtype)
        return CausalModel(backbone, specs, self.scoring, tokenizer)

    def _with_answers(self, rows: Sequence[tuple[int, Row]], pad_token_id: int, candidates: int | None) -> Batch:
        """Sequences candidate by candidate; labels of the positions from which any answer's token is predicted."""
        table, valid = label_table([row for _, row in rows], candidates)
        prompts = [row.sequences[0] for _ in table for _, row in rows]
        answers = [tokens for column in table for tokens in column]
        whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        ids, mask = padded(whole, pad_token_id, side=self.padding_side)
        targets, _ = padded(
            [(IGNORED,) * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)],
            IGNORED,
            side=self.padding_side,
        )
        said = (targets != IGNORED).any(0).nonzero().squeeze(1)
        positions = torch.arange(int(said[0]), int(said[-1]) + 1)
        inputs = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": positions - 1}
        if self.padding_side == "left":
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return Batch(
            inputs=inputs,
            task_ids=torch.tensor([task for _ in table for task, _ in rows]),
            groups=(),
            rows=len(rows),
            tokens=int(mask.sum()),
            padded_tokens=ids.numel(),
            answers=Answers(targets[:, positions], valid, task=rows[0][0]),
        )


class CausalModel(TextModel):
    """Scores all candidates of all rows at once."""

    def forward(self, batch: Batch) -> Tensor:
        """Log-probability of every candidate: (rows, candidates)."""
        assert batch.answers is not None
        inputs = dict(batch.inputs)
        # Only where answers are predicted are logits needed: over a whole vocabulary they are the largest tensor.
        spared = "logits_to_keep" in inspect.signature(self.backbone.forward).parameters
        positions = inputs["logits_to_keep"] if spared else inputs.pop("logits_to_keep")
        logits = self.backbone(**inputs, **self.routing(batch.task_ids), use_cache=False).logits
        if not spared:
            logits = logits[:, positions]
        rows, candidates = batch.answers.valid.shape
        return log_probabilities(logits, batch.answers.labels).reshape(candidates, rows).T


def _continuation(text: str, tokenizer: Any) -> Tokens:
    """The tokens with which an answer goes on after the cue, and the end."""
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end-of-text token: an answer could not end")
    cue, whole = (
        tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (ANSWER_CUE, f"{ANSWER_CUE} {text}")
    )
    if whole[: len(cue)] != cue:
        raise UsageError(f"the tokenizer joins {ANSWER_CUE!r} and the answer {text!r}: there is nothing to go on from")
    return (*whole[len(cue) :], tokenizer.eos_token_id)
