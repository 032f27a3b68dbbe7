"""What the sites of one call told each other, for the calls that go on from it.

Cached decoding calls a model token by token, and a decoder runs after its encoder. Several texts may be decoded in
turn, by one thread or by several. So what is held goes along with what such calls share: the key-value cache, or the
encoder's output. Where the caller made another object of these, the thread's last forward is what is gone on from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_HELD = "moepeft_held"


def hold(key: int, values: Mapping[str, Any], call: Mapping[str, Any], output: Any) -> None:
    """Let the cache or the encoder's output of a call carry what its sites told each other.

    Args:
        key: of the attachment on this model; a number, so that copies of a cache know it.
        values: what they told.
        call: the arguments by name.
        output: what the call returned.
    """
    if not values:
        return
    given, made = call.get("past_key_values"), getattr(output, "past_key_values", None)
    carriers = [cache for cache in ((given,) if made is given else (given, made)) if hasattr(cache, "get_seq_length")]
    if hasattr(output, "last_hidden_state"):
        carriers.append(output)
    for carrier in carriers:
        setattr(carrier, _HELD, {**getattr(carrier, _HELD, {}), key: values})


def recall(
    key: int, call: Mapping[str, Any], last: Mapping[str, Any], goes_on: bool | Tensor
) -> tuple[dict[str, Any], bool | Tensor]:
    """What the call that this one goes on from has left, and whether there is one.

    Only where something is left does the host ask the device.

    Args:
        key: of the attachment.
        call: the arguments by name.
        last: what is taken where neither cache nor encoder's output says anything.
        goes_on: whether the call goes on from another, or the number on the device that says so.
    """
    if goes_on is False:
        return {}, False
    carried = (getattr(call.get(name), _HELD, {}) for name in ("past_key_values", "encoder_outputs"))
    left = dict(next((held[key] for held in carried if key in held), last))
    if left:
        goes_on = bool(goes_on)
    return (left, goes_on) if goes_on is not False else ({}, False)
