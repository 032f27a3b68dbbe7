"""Find the linear layers of a model that an adapter can be put around, in the order in which the model calls them.

A site is found by what it is: a module that maps `in_features` to `out_features` and is called by its owner. What looks
like one and is none, or cannot be reached, is named with the reason (`LeftOut`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from .errors import NoMatchingSite, Unsupported
from .fused import Fused, expert_shapes, fused_parameters
from .reading import below, code_of, names_in_order, weights_read
from .roles import Role, Shape, Stream, networks_of, roles_of, stack_of, stream_of

SLOT = "moepeft"
"""Name of the child module by which an adapted layer carries its adapter."""
_GATE = re.compile(r"(^|[._])(gate|router)(\.classifier)?$")


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
        of_positions: whether it reads a table of positions, which belongs to no row of the batch.
        fused: where the matrix is, if it is an expert's that lies in one parameter with those of the other experts; no
            module has the site's name then.
    """

    name: str
    in_features: int
    out_features: int
    role: Role = "other"
    stream: Stream = "encoder"
    layer: int | None = None
    block: str | None = None
    stack: Stream = "encoder"
    of_positions: bool = False
    fused: Fused | None = None

    @property
    def carrier(self) -> str:
        """Name of the module whose call computes with the layer: its own, or that of the experts."""
        return self.name if self.fused is None else self.fused.module

    @property
    def regrouped(self) -> bool:
        """Whether it is a layer of an expert's own module, which gets a choice of the tokens of all rows."""
        return self.fused is None and self.layer is not None and "experts" in self.name.split(".")

    @property
    def is_gate(self) -> bool:
        """Whether it decides rather than maps: one output, or the router of a mixture of experts."""
        return self.out_features == 1 or _GATE.search(self.name) is not None


class LeftOut(NamedTuple):
    """A layer that carries no adapter although it holds matrices.

    Attributes:
        name: dotted path of the module in the model.
        numbers: how many numbers its matrices hold.
        why: the reason.
        layer: index of the repeated block it stands in, None outside of one.
    """

    name: str
    numbers: int
    why: str
    layer: int | None = None


def by_reason(left_out: Iterable[LeftOut]) -> list[str]:
    """A line for every reason: how many layers, how much they hold, the first one's name."""
    groups: dict[str, list[LeftOut]] = {}
    for layer in left_out:
        groups.setdefault(layer.why, []).append(layer)
    return [
        f"{len(layers)} x {why}, {sum(layer.numbers for layer in layers):,} numbers, e.g. {layers[0].name!r}"
        for why, layers in groups.items()
    ]


SitePattern = str | Iterable[str] | Callable[[LinearSite], bool]


def is_ours(name: str) -> bool:
    """Whether a module or tensor of that name belongs to adapters, and not to the bare model."""
    return SLOT in name.split(".")


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
    """All linear layers of `model` that its code calls, in the order of the calls.

    Raises:
        Unsupported: the model carries adapters of the peft package.
    """
    return survey(model)[0]


def survey(model: nn.Module) -> tuple[tuple[LinearSite, ...], tuple[LeftOut, ...]]:
    """The sites of a model, and the layers that are none although they look like it.

    Raises:
        Unsupported: the model carries adapters of the peft package.
    """
    modules = {name: module for name, module in model.named_modules() if not is_ours(name)}
    read, of_positions = _as_code_says(model, modules)
    lists = {name for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    shapes: list[Shape] = []
    left_out: list[LeftOut] = []
    experts: dict[int, list[LinearSite]] = {}
    for name in _in_order(model, modules):
        module, layer = modules[name], _layer(name, lists)
        if type(module).__module__.startswith("peft."):
            raise Unsupported(
                f"{name or 'the model'!r} carries adapters of the peft package, which would be adapted and frozen "
                "themselves: call merge_and_unload() or unload() of the PeftModel and attach to what it returns"
            )
        features = linear_features(module)
        why = _why_not(module, features, taken=name in read)
        if fused_parameters(module):
            experts.setdefault(len(shapes), []).extend(_expert_sites(name, module, layer))
        elif why is not None:
            left_out.append(LeftOut(name, _numbers(module), why, layer))
        elif features is not None:
            shapes.append(Shape(name, *features, layer))
    roles = roles_of(shapes)
    networks = networks_of(shapes, roles)
    two_stacks = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    sites: list[LinearSite] = []
    for place, shape in enumerate(shapes):
        sites.extend(experts.get(place, ()))
        name, role = shape.name, roles[shape.name]
        stack = stack_of(name) if two_stacks else "encoder"
        stream, network = stream_of(name, role, stack), networks.get(name)
        sites.append(LinearSite(*shape[:3], role, stream, shape.layer, network, stack, name in of_positions))
    return (*sites, *experts.get(len(shapes), ())), tuple(left_out)


def _expert_sites(name: str, module: nn.Module, layer: int | None) -> Iterator[LinearSite]:
    for index, parameter, into, out in expert_shapes(module):
        role: Role = "down" if parameter == "down_proj" else "up"
        where = Fused(name, parameter, index)
        yield LinearSite(f"{name}.{index}.{parameter}", into, out, role, layer=layer, fused=where)


def select_sites(
    sites: Sequence[LinearSite], pattern: SitePattern | None, exclude: SitePattern | None = None
) -> tuple[LinearSite, ...]:
    """The sites a pattern means.

    Args:
        sites: what `find_sites` returned.
        pattern: None for every linear layer of the repeated blocks (of the whole model if it has none) but gates and
            matrices of fused experts; a string is a regular expression that must match a whole name; a list holds
            roles (``"q"``), ends of names (``"attention.self.query"``), or ``"experts"`` for the matrices of experts;
            a callable decides site by site.
        exclude: a pattern of those to leave out.

    Raises:
        NoMatchingSite: a pattern, or one entry of a list, matches nothing, or nothing is left; lists what there is.
    """
    if pattern is None:
        chosen = [site for site in sites if site.layer is not None and _is_plain(site)] or list(sites)
    else:
        chosen = _matching(sites, pattern)
    unwanted = [] if exclude is None else _matching(sites, exclude)
    kept = tuple(site for site in chosen if site not in unwanted)
    if not kept:
        raise NoMatchingSite(_nothing(pattern if exclude is None else exclude, sites))
    return kept


def _matching(sites: Sequence[LinearSite], pattern: SitePattern) -> list[LinearSite]:
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
    return chosen


def _is_plain(site: LinearSite) -> bool:
    return not site.is_gate and site.fused is None


def _matches(site: LinearSite, entry: str) -> bool:
    if entry == "experts":
        return site.fused is not None or site.regrouped
    return entry in (site.role, site.name) or site.name.endswith(f".{entry}")


def _nothing(pattern: object, sites: Sequence[LinearSite]) -> str:
    if not sites:
        return "the model has no linear layer that an adapter could be put around"
    ends = Counter(site.name.rsplit(".", 1)[-1] for site in sites)
    roles = Counter(site.role for site in sites)
    shown = ", ".join(f"{end} ({count})" for end, count in sorted(ends.items()))
    return (
        f"{pattern!r} matches none of the model's {len(sites)} linear layers, or all. Their names end in: {shown}; "
        f"their roles are: {', '.join(sorted(roles))}; the first is {sites[0].name!r}. Give a regular expression for "
        "whole names, or a list of roles or name ends"
    )


def _in_order(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Names in the order of the calls; a module that has several names under its first registered one."""
    names = {id(module): name for name, module in modules.items()}
    called = (names[id(model.get_submodule(name))] for name in names_in_order(model) if not is_ours(name))
    yield from dict.fromkeys(called)


def _as_code_says(model: nn.Module, modules: dict[str, nn.Module]) -> tuple[set[str], set[str]]:
    """Names of what the model reads past the layer, and of what it calls on tables of positions alone."""
    read, of_positions = set(), set()
    for name, module in modules.items():
        code = code_of(module)
        read |= {below(name, path) for path in weights_read(module)}
        of_positions |= {below(name, path) for path in code.of_positions}
    in_sequences = {f"{path}.{name}" for path in of_positions for name, _ in _steps(modules.get(path))}
    return read, of_positions | in_sequences


def _steps(module: nn.Module | None) -> Iterable[tuple[str, nn.Module]]:
    return module.named_children() if isinstance(module, nn.Sequential) else ()


def _why_not(module: nn.Module, features: tuple[int, int] | None, *, taken: bool) -> str | None:
    """Why a module that holds matrices is no site; None for sites, and for what holds none."""
    if features is not None:
        if taken:
            return "the model computes with the weight itself, past any adapter"
        return "the layer returns more than its output" if code_of(module).several else None
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return f"{type(module).__name__} is a linear layer of a kind that is not known"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return "a convolution of width 1" if set(module.kernel_size) == {1} else None
    if any(parameter.dim() == 3 and len(parameter) > 1 for parameter in module.parameters(recurse=False)):
        return f"{type(module).__name__} holds several matrices in one parameter"
    return None


def _numbers(module: nn.Module) -> int:
    i, o = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(i, int) and isinstance(o, int):
        return i * o
    return sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.dim() > 1)


def _layer(name: str, lists: set[str]) -> int | None:
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if part.isdigit() and ".".join(parts[:depth]) in lists:
            return int(part)
    return None
