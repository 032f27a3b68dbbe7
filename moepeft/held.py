"""What the sites of one call told each other, for the calls that go on from it.

Cached decoding calls a model token by token, and a decoder runs after its encoder. Several texts may be decoded in
turn, by one thread or by several. So what is held goes along with what such calls share: the key-value cache, or the
encoder's output. Where the caller made another object of these, the thread's last forward is what is gone on from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_HELD = "moepeft_held"


def hold(key: int, values: Mapping[str, Any], call: Mapping[str, Any], output: Any) -> None:
    """Let the cache or the encoder's output of a call carry what its sites told each other.

    Args:
        key: of the attachment on this model; a number, so that copies of a cache know it.
        values: what they told.
        call: the arguments by name.
        output: what the call returned.
    """
    if not values or torch.compiler.is_compiling():
        return
    caches = {id(cache): cache for cache in (call.get("past_key_values"), getattr(output, "past_key_values", None))}
    carriers = [cache for cache in caches.values() if hasattr(cache, "get_seq_length")]
    if hasattr(output, "last_hidden_state"):
        carriers.append(output)
    for carrier in carriers:
        setattr(carrier, _HELD, {**getattr(carrier, _HELD, {}), key: values})


def recall(key: int, call: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    """What the call that this one goes on from has left; `last` where neither cache nor encoder's output says so."""
    for name in ("past_key_values", "encoder_outputs"):
        held: Mapping[int, Mapping[str, Any]] = getattr(call.get(name), _HELD, {})
        if key in held:
            return dict(held[key])
    return dict(last)
