"""Find the linear layers of a model and say what each one does.

A site is found by what it is: a module that maps `in_features` to `out_features`. Its role comes from the names the
field uses for projections, and where a name says nothing, from the shape: in a repeated block, d -> f followed by
f -> d is a feed-forward network whatever it is called.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from .errors import NoMatchingSite

Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "down", "other"]
Stream = Literal["encoder", "decoder"]


@dataclass(frozen=True, slots=True)
class LinearSite:
    """A frozen linear layer that can carry an adapter.

    Attributes:
        name: dotted path of the module in the model.
        in_features: width of the layer's input.
        out_features: width of its output.
        role: what the layer does; ``other`` when its name and shape say nothing.
        stream: whose padding mask applies to its input; cross-attention keys and values read the encoder.
        layer: index of the repeated block it stands in, None outside of one.
        block: name of the feed-forward network it is part of (roles gate, up, down), None elsewhere.
        stack: where it stands: cross-attention keys and values stand in the decoder, though they read the encoder.
            ``encoder`` in a model that has one stack only.
    """

    name: str
    in_features: int
    out_features: int
    role: Role = "other"
    stream: Stream = "encoder"
    layer: int | None = None
    block: str | None = None
    stack: Stream = "encoder"


SitePattern = str | Iterable[str] | Callable[[LinearSite], bool]

# Last component of a module's path -> role, over BERT, DeBERTa, DistilBERT, T5, LLaMA-like, GPT-2, OPT, BLOOM, ViT.
_ROLE_OF_NAME: dict[str, Role] = {
    **dict.fromkeys(("q", "q_proj", "query", "query_proj", "q_lin", "q_attn"), "q"),
    **dict.fromkeys(("k", "k_proj", "key", "key_proj", "k_lin"), "k"),
    **dict.fromkeys(("v", "v_proj", "value", "value_proj", "v_lin"), "v"),
    **dict.fromkeys(("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv"), "qkv"),
    **dict.fromkeys(("o", "o_proj", "out_proj", "out_lin"), "o"),
    **dict.fromkeys(("gate_proj", "wi_0"), "gate"),
    **dict.fromkeys(("up_proj", "wi", "wi_1", "fc1", "lin1", "c_fc", "dense_h_to_4h"), "up"),
    **dict.fromkeys(("down_proj", "wo", "fc2", "lin2", "dense_4h_to_h"), "down"),
}
_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
_CROSS_ATTENTION = re.compile(r"encdecattention|encoder_attn|cross_?att(entio)?n", re.IGNORECASE)


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear layer, None for any other module.

    Quantised layers count when they say their features, as bitsandbytes' do; so does GPT-2's Conv1D, whose weight is
    stored transposed.
    """
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1]
    i, o = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(i, int) and isinstance(o, int) and isinstance(weight, Tensor):
        return i, o
    return None


def find_sites(model: nn.Module) -> tuple[LinearSite, ...]:
    """All linear layers of `model` that call their own `forward`, in registration order.

    Layers inside `torch.nn.MultiheadAttention` and torch's own transformer layers are left out: those modules read
    the weights directly, so an adapter around the layer would silently do nothing.
    """
    two_streams = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    blocks = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    bypassing = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    bypassed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, bypassing))
    found = []
    for name, module in model.named_modules():
        features = linear_features(module)
        if features is None or name.startswith(bypassed):
            continue
        role = _role_by_name(name)
        stack = _stack(name) if two_streams else "encoder"
        stream = _stream(name, role, stack)
        found.append(LinearSite(name, *features, role=role, stream=stream, layer=_layer(name, blocks), stack=stack))
    return tuple(_with_blocks(_with_roles_by_shape(found)))


def select_sites(sites: Sequence[LinearSite], pattern: SitePattern | None) -> tuple[LinearSite, ...]:
    """The sites a pattern means.

    Args:
        sites: what `find_sites` returned.
        pattern: None for every linear layer of the repeated blocks (of the whole model if it has none); a string is
            a regular expression that must match a whole name; a list holds roles (``"q"``) or ends of names
            (``"attention.self.query"``); a callable decides site by site.

    Raises:
        NoMatchingSite: the pattern, or one entry of the list, matches nothing; lists what there is.
    """
    if pattern is None:
        return tuple(site for site in sites if site.layer is not None) or tuple(sites)
    if isinstance(pattern, str):
        expression = re.compile(pattern)
        chosen = [site for site in sites if expression.fullmatch(site.name)]
    elif callable(pattern):
        chosen = [site for site in sites if pattern(site)]
    else:
        entries = list(pattern)
        for entry in entries:
            if not any(_matches(site, entry) for site in sites):
                raise NoMatchingSite(_nothing(entry, sites))
        chosen = [site for site in sites if any(_matches(site, entry) for entry in entries)]
    if not chosen:
        raise NoMatchingSite(_nothing(pattern, sites))
    return tuple(chosen)


def _matches(site: LinearSite, entry: str) -> bool:
    return entry in (site.role, site.name) or site.name.endswith(f".{entry}")


def _nothing(pattern: object, sites: Sequence[LinearSite]) -> str:
    if not sites:
        return "the model has no linear layer that an adapter could be put around"
    ends = Counter(site.name.rsplit(".", 1)[-1] for site in sites)
    roles = Counter(site.role for site in sites)
    shown = ", ".join(f"{end} ({count})" for end, count in sorted(ends.items()))
    return (
        f"{pattern!r} matches none of the model's {len(sites)} linear layers. Their names end in: {shown}; "
        f"their roles are: {', '.join(sorted(roles))}; the first is {sites[0].name!r}. Give a regular expression for "
        "whole names, or a list of roles or name ends"
    )


def _role_by_name(name: str) -> Role:
    *parents, last = name.split(".")
    in_attention = any(_ATTENTION.search(parent) for parent in parents)
    if last == "c_proj":
        return "o" if in_attention else "down"
    if last == "dense":  # BERT's naming: the parent says which of its three dense layers this is
        parent = parents[-1] if parents else ""
        if parent == "intermediate":
            return "up"
        if in_attention:
            return "o"
        return "down" if parent == "output" else "other"
    return _ROLE_OF_NAME.get(last, "other")


def _stack(name: str) -> Stream:
    return "decoder" if "decoder" in name.split(".") else "encoder"


def _stream(name: str, role: Role, stack: Stream) -> Stream:
    # Cross-attention projects the encoder's output to keys and values: the encoder's padding applies there.
    return "encoder" if role in ("k", "v") and _CROSS_ATTENTION.search(name) else stack


def _layer(name: str, blocks: set[str]) -> int | None:
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if part.isdigit() and ".".join(parts[:depth]) in blocks:
            return int(part)
    return None


def _with_roles_by_shape(sites: list[LinearSite]) -> list[LinearSite]:
    """Give unnamed layers of a block the roles up and down where one undoes the other's widening."""
    roles: dict[str, Role] = {}
    unnamed = [site for site in sites if site.role == "other" and site.layer is not None]
    for up, down in pairwise(unnamed):
        inverse = (up.in_features, up.out_features) == (down.out_features, down.in_features)
        if inverse and up.out_features > up.in_features and up.layer == down.layer:
            roles[up.name], roles[down.name] = "up", "down"
    return [replace(site, role=roles.get(site.name, site.role)) for site in sites]


def _with_blocks(sites: list[LinearSite]) -> list[LinearSite]:
    """Name the feed-forward network of every up, gate and down projection: their nearest common ancestor."""
    block_of: dict[str, str] = {}
    inward = [site for site in sites if site.role in ("up", "gate")]
    for down in (site for site in sites if site.role == "down"):
        parts = down.name.split(".")
        for depth in range(len(parts) - 1, -1, -1):
            prefix = "".join(f"{part}." for part in parts[:depth])
            members = [site for site in inward if site.name.startswith(prefix)]
            if not members:
                continue
            widths = {site.out_features for site in members}
            if sorted(site.role for site in members) in (["up"], ["gate", "up"]) and widths == {down.in_features}:
                block_of.update({site.name: prefix.rstrip(".") for site in [*members, down]})
            break
    return [replace(site, block=block_of.get(site.name)) for site in sites]
