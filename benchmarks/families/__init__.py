"""How tasks meet models. A family says how rows become token sequences, what is trained on and how answers are read.

* `encoder`: hidden states, pooled, and a linear head per task.
* `seq2seq`: every task is text to text; an encoder-decoder model gives the answer's tokens. No heads.
* `causal`: the same with a decoder-only model, which goes on where the prompt ends. No heads.
"""

from __future__ import annotations

from benchmarks.families.base import UNREADABLE, AnyAttachment, Family, Model
from benchmarks.families.causal import Causal
from benchmarks.families.encoder import Encoder
from benchmarks.families.seq2seq import Seq2Seq
from benchmarks.protocols.protocol import Protocol

__all__ = ["UNREADABLE", "AnyAttachment", "Family", "Model", "family_of"]


def family_of(protocol: Protocol) -> Family:
    """The family a protocol asks for."""
    if protocol.family == "seq2seq":
        return Seq2Seq(protocol.scoring)
    return Causal(protocol.scoring) if protocol.family == "causal" else Encoder()
