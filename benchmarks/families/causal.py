"""Text with a decoder-only model: the answer goes on where the prompt ends, and only its tokens are trained on."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.backbones.load import BackboneSource, load_backbone
from benchmarks.families.batch import TextBatch, TextRow, Tokens, padded
from benchmarks.families.prompts import ANSWER_CUE, Section, to_be_continued
from benchmarks.families.text import (
    IGNORED,
    TIMED_ANSWER,
    TextFamily,
    TextModel,
    label_table,
    log_probabilities,
    most_candidates,
    prompts_and_answers,
)
from benchmarks.protocols.errors import UsageError
from moepeft import Attachment


@dataclass(frozen=True)
class Causal(TextFamily):
    """The family of decoder-only models.

    Attributes:
        padding_side: of sequences with answers; scores do not depend on it. Prompts to be continued are padded on
            the left in any case.
    """

    padding_side: Literal["right", "left"] = "right"

    def prompt(self, name: str, sections: Sequence[Section]) -> str:
        """One line per part, and the cue."""
        return to_be_continued(name, sections, titled=self.protocol.task_prefix)

    def prompt_ids(self, texts: list[str]) -> list[list[int]]:
        """Without an end: some tokenizers end every text, and a prompt is no end."""
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=True)["input_ids"]
        return [ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids for ids in found]

    def answer_ids(self, text: str) -> Tokens:
        """The tokens with which the answer goes on after the cue, and the end; a cloze answer has no end.

        A model as it comes goes on after a right answer, and would be charged for not stopping.
        """
        cloze = self.protocol.prompt == "cloze"
        if self.tokenizer.eos_token_id is None and not cloze:
            raise UsageError("the tokenizer has no end-of-text token: an answer could not end")
        cue, whole = (
            tuple(self.tokenizer(part, add_special_tokens=False)["input_ids"])
            for part in (ANSWER_CUE, f"{ANSWER_CUE} {text}")
        )
        if whole[: len(cue)] != cue:
            raise UsageError(
                f"the tokenizer joins {ANSWER_CUE!r} and the answer {text!r}: there is nothing to go on from"
            )
        said = whole[len(cue) :]
        return said if cloze else (*said, self.tokenizer.eos_token_id)

    def room(self, answers: Sequence[Tokens]) -> int:
        """Prompt and longest answer share one sequence."""
        return self.protocol.max_length - max(map(len, answers))

    def training_batch(self, rows: Sequence[tuple[int, TextRow]]) -> TextBatch:
        """Every prompt with its right answer."""
        return self._with_answers(rows, None)

    def scoring_batch(self, rows: Sequence[tuple[int, TextRow]]) -> TextBatch:
        """Every prompt with each of its candidates; to generate, the prompts alone."""
        if self.protocol.scoring == "generate":
            return prompts_and_answers(rows, self.tokenizer.pad_token_id, most_candidates(rows), side="left")
        return self._with_answers(rows, most_candidates(rows))

    def timing_row(self, tokens: Tokens) -> TextRow:
        """A sequence of these tokens, of which the last few are the answer."""
        return TextRow(prompt=tokens[:-TIMED_ANSWER], answers=(tokens[-TIMED_ANSWER:],), gold=0, label=0.0, index=0)

    def load(self, source: BackboneSource, seed: int) -> TextModel:
        """The frozen model."""
        protocol = self.protocol
        backbone = load_backbone(source, "causal", dropout=protocol.dropout, dtype=protocol.base_dtype)
        return CausalModel(backbone, self.specs, protocol.scoring, self.tokenizer)

    def _with_answers(self, rows: Sequence[tuple[int, TextRow]], candidates: int | None) -> TextBatch:
        """Sequences candidate by candidate; labels of the positions from which any answer's token is predicted."""
        table, valid = label_table([row for _, row in rows], candidates)
        prompts = [row.prompt for _ in table for _, row in rows]
        answers = [tokens for column in table for tokens in column]
        whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        ids, mask = padded(whole, self.tokenizer.pad_token_id, side=self.padding_side)
        targets, _ = padded(
            [(IGNORED,) * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)],
            IGNORED,
            side=self.padding_side,
        )
        is_said = targets != IGNORED
        said = is_said.any(0).nonzero().squeeze(1)
        positions = torch.arange(int(said[0]), int(said[-1]) + 1)
        inputs = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": positions - 1}
        if self.padding_side == "left":
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        tasks = tuple(task for task, _ in rows)
        return TextBatch(
            inputs=inputs,
            task_ids=torch.tensor(tasks * len(table)),
            rows=len(rows),
            tokens=int(mask.sum()),
            padded_tokens=ids.numel(),
            labels=targets[:, positions],
            valid=valid,
            tasks=tasks,
            prompts=mask * ~is_said,
        )


class CausalModel(TextModel):
    """Scores all candidates of all rows at once."""

    def forward(self, batch: TextBatch) -> Tensor:
        """Log-probability of every candidate: (rows, candidates)."""
        inputs = dict(batch.inputs)
        # Only where answers are predicted are logits needed: over a whole vocabulary they are the largest tensor.
        spared = "logits_to_keep" in inspect.signature(self.backbone.forward).parameters
        positions = inputs["logits_to_keep"] if spared else inputs.pop("logits_to_keep")
        with self._reading(batch.prompts):
            logits = self.call(**inputs, **self.routing(batch.task_ids), use_cache=False).logits
        if not spared:
            logits = logits[:, positions]
        rows, candidates = batch.valid.shape
        return log_probabilities(logits, batch.labels).reshape(candidates, rows).T

    def _reading(self, prompts: Tensor | None) -> AbstractContextManager[None]:
        """Inside, methods that choose by whole rows look at the prompts alone, as they do when text is generated.

        A choice that is made of the answer as well tells the answer to the positions that are to predict it.
        """
        adapters = self.attachment
        if isinstance(adapters, Attachment) and not adapters.factory.capabilities.cache_consistent:
            return adapters.route(mask=prompts)
        return nullcontext()
