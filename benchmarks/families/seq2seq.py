"""Text to text with an encoder-decoder model: the encoder reads the prompt, the decoder says the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.backbones.load import BackboneSource, load_backbone
from benchmarks.families.batch import Batch, Row
from benchmarks.families.prompts import text_to_text
from benchmarks.families.text import (
    IGNORED,
    TIMED_ANSWER,
    TextModel,
    Tokens,
    encode_rows,
    log_probabilities,
    most_candidates,
    prompts_and_answers,
)
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Protocol, Scoring
from benchmarks.tasks.base import Example, TaskSpec


@dataclass(frozen=True)
class Seq2Seq:
    """The family of encoder-decoder models; see `benchmarks.families.base.Family`.

    Attributes:
        scoring: how an answer is chosen.
    """

    scoring: Scoring = "likelihood"
    has_heads = False

    def encode(
        self, spec: TaskSpec, indices: Sequence[int], examples: Sequence[Example], tokenizer: Any, max_length: int
    ) -> tuple[Row, ...]:
        """Rows of one prompt of at most `max_length` tokens; answers are never cut."""

        def prompt_ids(texts: list[str]) -> list[list[int]]:
            ids: list[list[int]] = tokenizer(texts, add_special_tokens=True)["input_ids"]
            return ids

        def answer_ids(text: str) -> Tokens:
            ids = tuple(tokenizer(text_target=text)["input_ids"])
            if tokenizer.eos_token_id is None or ids[-1:] != (tokenizer.eos_token_id,):
                raise UsageError("the tokenizer puts no end-of-text token after an answer: generation could not stop")
            return ids

        return encode_rows(
            spec,
            indices,
            examples,
            render=text_to_text,
            prompt_ids=prompt_ids,
            answer_ids=answer_ids,
            room=lambda _: max_length,
            tokenizer=tokenizer,
        )

    def training_batch(self, rows: Sequence[tuple[int, Row]], specs: Sequence[TaskSpec], pad_token_id: int) -> Batch:
        """Prompts, and their right answers."""
        return _collate(rows, pad_token_id, None)

    def scoring_batch(self, rows: Sequence[tuple[int, Row]], specs: Sequence[TaskSpec], pad_token_id: int) -> Batch:
        """Prompts, and all candidates."""
        return _collate(rows, pad_token_id, most_candidates(rows))

    def timing_row(self, ids: tuple[int, ...], *, segments: bool) -> Row:
        """A prompt of these tokens, and the last few of them once more as the answer."""
        return Row((ids,), None, 0.0, 0, (ids[-TIMED_ANSWER:],))

    def load(
        self, source: BackboneSource, specs: Sequence[TaskSpec], protocol: Protocol, seed: int, tokenizer: Any
    ) -> TextModel:
        """The frozen model."""
        backbone = load_backbone(source, "seq2seq", dropout=protocol.dropout, dtype=protocol.base_dtype)
        return Seq2SeqModel(backbone, specs, self.scoring, tokenizer)


class Seq2SeqModel(TextModel):
    """Scores candidates one after the other; the encoder runs once for all of them."""

    def forward(self, batch: Batch) -> Tensor:
        """Log-probability of every candidate: (rows, candidates)."""
        assert batch.answers is not None
        call: dict[str, Any] = {**batch.inputs, **self.routing(batch.task_ids)}
        columns = []
        for labels in batch.answers.labels:
            output = self.backbone(
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


def _collate(rows: Sequence[tuple[int, Row]], pad_token_id: int, candidates: int | None) -> Batch:
    batch = prompts_and_answers(rows, pad_token_id, candidates)
    assert batch.answers is not None
    labels = batch.answers.labels
    # The decoder reads the answers: they are tokens of the batch as well.
    said = int((labels != IGNORED).sum())
    return replace(batch, tokens=batch.tokens + said, padded_tokens=batch.padded_tokens + labels.numel())
