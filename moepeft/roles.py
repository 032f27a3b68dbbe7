"""What a linear layer does, by the names that the field uses for projections, and where they say nothing by its shape.

In a repeated block, d -> f followed by f -> d is a feed-forward network whatever it is called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "down", "other"]
Stream = Literal["encoder", "decoder"]

# Last component of a module's path -> role. `Wi`, `gate_up_proj` and `input_linear` hold gate and up in one matrix.
_ROLE_OF_NAME: dict[str, Role] = {
    **dict.fromkeys(("q", "q_proj", "query", "query_proj", "q_lin", "q_attn", "Wq"), "q"),
    **dict.fromkeys(("k", "k_proj", "key", "key_proj", "k_lin", "Wk"), "k"),
    **dict.fromkeys(("v", "v_proj", "value", "value_proj", "v_lin", "Wv"), "v"),
    **dict.fromkeys(("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv"), "qkv"),
    **dict.fromkeys(("o", "o_proj", "out_proj", "out_lin"), "o"),
    **dict.fromkeys(("gate_proj", "wi_0", "w1"), "gate"),
    **dict.fromkeys(("up_proj", "wi", "wi_1", "fc1", "lin1", "c_fc", "dense_h_to_4h", "w3"), "up"),
    **dict.fromkeys(("Wi", "gate_up_proj", "fc_in", "input_linear", "intermediate_dense", "linear_fc1"), "up"),
    **dict.fromkeys(("down_proj", "wo", "fc2", "lin2", "dense_4h_to_h", "w2"), "down"),
    **dict.fromkeys(("fc_out", "output_linear", "output_dense", "linear_fc2"), "down"),
}
# What an attention calls its output, and a feed-forward network its second layer.
_IN_ATTENTION: dict[str, tuple[Role, Role]] = {
    "c_proj": ("o", "down"),
    "Wo": ("o", "down"),
    "in_proj": ("qkv", "other"),
}
_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
_CROSS_ATTENTION = re.compile(r"encdecattention|encoder_attn|cross_?att(entio)?n", re.IGNORECASE)


class Shape(NamedTuple):
    """A layer as far as roles and networks are told from it."""

    name: str
    in_features: int
    out_features: int
    layer: int | None


def roles_of(layers: Sequence[Shape]) -> dict[str, Role]:
    """The role of every layer by its name."""
    roles = {layer.name: _by_name(layer.name) for layer in layers}
    unnamed = [layer for layer in layers if roles[layer.name] == "other" and layer.layer is not None]
    for up, down in pairwise(unnamed):
        inverse = (up.in_features, up.out_features) == (down.out_features, down.in_features)
        if inverse and up.out_features > up.in_features and up.layer == down.layer:
            roles[up.name], roles[down.name] = "up", "down"
    return roles


def networks_of(layers: Sequence[Shape], roles: Mapping[str, Role]) -> dict[str, str]:
    """The feed-forward network of every up, gate and down projection: their nearest common ancestor."""
    network: dict[str, str] = {}
    inward = [layer for layer in layers if roles[layer.name] in ("up", "gate")]
    for down in (layer for layer in layers if roles[layer.name] == "down"):
        parts = down.name.split(".")
        for depth in range(len(parts) - 1, -1, -1):
            prefix = "".join(f"{part}." for part in parts[:depth])
            members = [layer for layer in inward if layer.name.startswith(prefix)]
            if not members:
                continue
            if _feeds(members, roles, down.in_features):
                network.update({layer.name: prefix.rstrip(".") for layer in [*members, down]})
            break
    return network


def _feeds(members: Sequence[Shape], roles: Mapping[str, Role], width: int) -> bool:
    """Whether the inward projections make what a down projection of that width reads."""
    found, widths = sorted(roles[layer.name] for layer in members), {layer.out_features for layer in members}
    if found == ["up"]:
        return widths <= {width, 2 * width}  # gate and up side by side in one matrix
    return found == ["gate", "up"] and widths == {width}


def stack_of(name: str) -> Stream:
    """Where a layer of an encoder-decoder model stands."""
    return "decoder" if "decoder" in name.split(".") else "encoder"


def stream_of(name: str, role: Role, stack: Stream) -> Stream:
    """Whose padding its input has: cross-attention projects the encoder's output to keys and values."""
    return "encoder" if role in ("k", "v") and _CROSS_ATTENTION.search(name) else stack


def _by_name(name: str) -> Role:
    *parents, last = name.split(".")
    in_attention = any(_ATTENTION.search(parent) for parent in parents)
    if last in _IN_ATTENTION:
        return _IN_ATTENTION[last][not in_attention]
    if last == "dense":  # BERT's naming: the parent says which of its three dense layers this is
        parent = parents[-1] if parents else ""
        if parent == "intermediate":
            return "up"
        if in_attention:
            return "o"
        return "down" if parent == "output" else "other"
    return _ROLE_OF_NAME.get(last, "other")
