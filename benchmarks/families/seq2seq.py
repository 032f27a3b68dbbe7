"""Text to text with an encoder-decoder model: the encoder reads the prompt, the decoder says the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.backbones.load import BackboneSource, load_backbone
from benchmarks.families.batch import TextBatch, TextRow, Tokens
from benchmarks.families.prompts import Section, text_to_text
from benchmarks.families.text import (
    IGNORED,
    TIMED_ANSWER,
    TextFamily,
    TextModel,
    log_probabilities,
    most_candidates,
    prompts_and_answers,
)
from benchmarks.protocols.errors import UsageError


@dataclass(frozen=True)
class Seq2Seq(TextFamily):
    """The family of encoder-decoder models."""

    def prompt(self, name: str, sections: Sequence[Section]) -> str:
        """``rte sentence1: ... sentence2: ...``: the prompt of every task begins with the task's name."""
        return text_to_text(name, sections)

    def prompt_ids(self, texts: list[str]) -> list[list[int]]:
        """With the end that the encoder expects."""
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=True)["input_ids"]
        return ids

    def answer_ids(self, text: str) -> Tokens:
        """What the decoder is to say."""
        ids = tuple(self.tokenizer(text_target=text)["input_ids"])
        if self.tokenizer.eos_token_id is None or ids[-1:] != (self.tokenizer.eos_token_id,):
            raise UsageError("the tokenizer puts no end-of-text token after an answer: generation could not stop")
        return ids

    def room(self, answers: Sequence[Tokens]) -> int:
        """Answers stand in a sequence of their own."""
        return self.protocol.max_length

    def training_batch(self, rows: Sequence[tuple[int, TextRow]]) -> TextBatch:
        """Prompts, and their right answers."""
        return self._collate(rows, None)

    def scoring_batch(self, rows: Sequence[tuple[int, TextRow]]) -> TextBatch:
        """Prompts, and all candidates."""
        return self._collate(rows, most_candidates(rows))

    def _collate(self, rows: Sequence[tuple[int, TextRow]], candidates: int | None) -> TextBatch:
        batch = prompts_and_answers(rows, self.tokenizer.pad_token_id, candidates)
        # The decoder reads the answers: they are tokens of the batch as well.
        said = int((batch.labels != IGNORED).sum())
        return replace(batch, tokens=batch.tokens + said, padded_tokens=batch.padded_tokens + batch.labels.numel())

    def timing_row(self, tokens: Tokens) -> TextRow:
        """A prompt of these tokens, and the last few of them once more as the answer."""
        return TextRow(prompt=tokens, answers=(tokens[-TIMED_ANSWER:],), gold=0, label=0.0, index=0)

    def load(self, source: BackboneSource, seed: int) -> TextModel:
        """The frozen model."""
        protocol = self.protocol
        backbone = load_backbone(source, "seq2seq", dropout=protocol.dropout, dtype=protocol.base_dtype)
        return Seq2SeqModel(backbone, self.specs, protocol.scoring, self.tokenizer)


class Seq2SeqModel(TextModel):
    """Scores candidates one after the other; the encoder runs once for all of them."""

    def forward(self, batch: TextBatch) -> Tensor:
        """Log-probability of every candidate: (rows, candidates)."""
        call: dict[str, Any] = {**batch.inputs, **self.routing(batch.task_ids)}
        columns = []
        for labels in batch.labels:
            output = self.call(
                **call,
                decoder_input_ids=self.backbone.prepare_decoder_input_ids_from_labels(labels),  # type: ignore[operator]
                decoder_attention_mask=(labels != IGNORED).long(),
                use_cache=False,
            )
            columns.append(log_probabilities(output.logits, labels))
            # Rows stay what they are from candidate to candidate, so what adapters keep of the encoder pass fits.
            call.pop("input_ids", None)
            call["encoder_outputs"] = (output.encoder_last_hidden_state,)
        return torch.stack(columns, dim=1)
