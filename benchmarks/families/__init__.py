"""How tasks meet models. A family says how rows become token sequences, what is trained on and how answers are read.

* `encoder`: hidden states, pooled, and a linear head per task.
* `seq2seq`: every task is text to text; an encoder-decoder model gives the answer's tokens. No heads.
* `causal`: the same with a decoder-only model, which goes on where the prompt ends. No heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.families.base import UNREADABLE, Family, Model
from benchmarks.families.causal import Causal
from benchmarks.families.encoder import Encoder
from benchmarks.families.seq2seq import Seq2Seq
from benchmarks.protocols.protocol import Family as FamilyName
from benchmarks.protocols.protocol import Protocol
from benchmarks.tasks.base import TaskSpec

__all__ = ["FAMILIES", "UNREADABLE", "AnyFamily", "AnyModel", "Family", "Model", "family_of"]

AnyFamily = Family[Any, Any]
AnyModel = Model[Any]

FAMILIES: Mapping[FamilyName, type[AnyFamily]] = {"encoder": Encoder, "seq2seq": Seq2Seq, "causal": Causal}


def family_of(protocol: Protocol, tokenizer: Any, specs: Sequence[TaskSpec]) -> AnyFamily:
    """The family that a protocol asks for, for these tasks."""
    return FAMILIES[protocol.family](protocol, tokenizer, tuple(specs))
