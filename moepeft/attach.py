"""Put a method's adapters around a model's frozen layers. `moepeft.hooks` says how."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from . import building, heads
from .attachment import Attachment
from .errors import AlreadyAttached, ConfigError, Unsupported
from .hooks import install
from .protocols import AdapterFactory
from .shards import is_sharded
from .sites import SLOT, LeftOut, LinearSite, SitePattern, by_reason, select_sites, survey
from .state import State, states_of
from .trained import find_modules, is_beneath, unfreeze, warn_of_new_heads

__all__ = ["Attachment", "attach", "attachment", "attachments"]


def attach(
    model: nn.Module,
    factory: AdapterFactory,
    sites: SitePattern | None = None,
    *,
    exclude: SitePattern | None = None,
    train: Iterable[str] | None = None,
    train_per_task: Iterable[str] = (),
) -> Attachment:
    """Freeze `model` and put the method's adapters around its linear layers.

    Layers that an adapter cannot reach are left out; `Attachment.summary` names them. If they are most of the model's
    blocks, a warning does.

    Args:
        model: any module with linear layers. Its own `forward` is what the user goes on calling.
        factory: the method's configuration, e.g. ``EPT(rank=8, num_tasks=8)``.
        sites: which layers; see `moepeft.sites.select_sites`. None: all linear layers of the repeated blocks.
        exclude: which of these to leave out, said in the same ways.
        train: modules that train whole beside the adapters and carry none, such as ``["classifier"]``: dotted names, or
            last components of them. They are in `Attachment.parameters` and in what `Attachment.save` writes. None: no
            module, and a new head that stays frozen is warned of.
        train_per_task: modules of which every task trains a copy of its own, named alike: heads that take and give
            tensors with the rows first. Rows go through the copies by the same ids as through the adapters.

    Raises:
        ConfigError: `factory` is a name or a class in place of a configured method.
        NoMatchingSite: `sites`, `exclude`, `train` or `train_per_task` matches nothing.
        Unsupported: the method cannot work on this model, the model is itself a layer, its blocks have no layer that it
            could adapt and `sites` was not given, or its weights are sharded already.
        AlreadyAttached: a chosen layer has an adapter. Attachments on other layers stand side by side.
    """
    if isinstance(factory, type) or not isinstance(factory, AdapterFactory):
        raise ConfigError(
            f"factory={factory!r} is no configured method: give one, such as moepeft.LoRA(rank=8) or "
            "moepeft.method('lora', rank=8)"
        )
    neighbours = _neighbours(model)
    along, per_task = find_modules(model, train or ()), find_modules(model, train_per_task)
    if per_task:
        heads.check(model, per_task, factory)
    whole = (*along, *per_task)
    found, unreachable = survey(model)
    if any(site.carrier == "" for site in found):
        raise Unsupported(
            f"the model is itself a layer, a {type(model).__name__}, and nothing around it can begin a forward: wrap "
            "the layer, as in nn.Sequential(layer)"
        )
    wanted = tuple(site for site in select_sites(found, sites, exclude) if not is_beneath(site.name, whole))
    if sites is None:
        _refuse_the_head_alone(model, wanted, unreachable)
    routable = [site for site in wanted if building.why_not(factory, site) is None]
    chosen = tuple(factory.select(routable)) if routable else ()
    if not chosen:
        why = building.why_not(factory, wanted[0]) if wanted and not routable else None
        raise Unsupported(f"{factory.name} can adapt none of the chosen layers{f', e.g. {why}' if why else ''}")
    if sites is None:
        _warn_of_the_unreachable(model, chosen, (*unreachable, *_experts_left(factory, found)))
    _refuse_what_others_carry(neighbours, chosen, whole)
    shared, built = building.build(factory, chosen)
    left_out = (
        *unreachable,
        *_left_by(factory, [site for site in found if not is_beneath(site.name, whole)], wanted, chosen),
    )
    state = State(model, factory, chosen, shared, left_out, along, per_task)
    if not neighbours:  # else frozen but for the adapters, and what their attachments train
        model.requires_grad_(False)
    unfreeze(model, along)
    warn_of_new_heads(state, asked=train is not None or bool(per_task or neighbours))
    install(state, built)
    if building.on_meta(built[0]):
        state.without_values = built[0]
    return Attachment(model, state.number)


def _neighbours(model: nn.Module) -> list[State]:
    """Of the attachments that the model has already."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise Unsupported(
            "the model's weights are sharded, and its processes would train other adapters each: attach first, then "
            "shard the model with them; saved values are read by their restore() afterwards"
        )
    neighbours = states_of(model)
    if not neighbours and any(hasattr(module, SLOT) for module in model.modules()):
        raise AlreadyAttached(
            "a part of the model, or what it is a part of, has adapters: call detach() on their attachment first"
        )
    return neighbours


def _refuse_what_others_carry(
    neighbours: Sequence[State], chosen: Sequence[LinearSite], whole: tuple[str, ...]
) -> None:
    taken = {site.carrier for state in neighbours for site in state.sites}
    theirs = [name for state in neighbours for name in (*state.train, *state.train_per_task)]
    both = [site.carrier for site in chosen if site.carrier in taken or is_beneath(site.carrier, theirs)]
    both += [name for name in (*taken, *theirs) if is_beneath(name, whole)]
    both += [name for name in whole if is_beneath(name, theirs)]
    if both:
        raise AlreadyAttached(
            f"{both[0]!r} has adapters already, or trains with others: detach() these first, or name "
            "by `sites`, `exclude` and `train` what belongs to none"
        )


def _left_by(
    factory: AdapterFactory,
    found: Sequence[LinearSite],
    wanted: Sequence[LinearSite],
    chosen: Sequence[LinearSite],
) -> Iterator[LeftOut]:
    """Layers of the blocks that would have been adapted but for what they are."""
    for site in found:
        if site in chosen:
            continue
        why = "a gate" if site.is_gate and site.layer is not None and site not in wanted else None
        if site in wanted:
            why = building.why_not(factory, site) or f"not for {factory.name}"
        if why is not None:
            yield _left(site, why)
    if not any(site.fused for site in wanted):
        yield from _experts_left(factory, [site for site in found if site.fused is not None])


def _experts_left(factory: AdapterFactory, found: Sequence[LinearSite]) -> Iterator[LeftOut]:
    for site in found:
        why = building.why_not(factory, site)
        if site.fused is not None or (site.regrouped and why is not None):
            yield _left(site, why or "an expert's matrix, adapted where `sites` names 'experts'")


def _left(site: LinearSite, why: str) -> LeftOut:
    return LeftOut(site.name, site.in_features * site.out_features, why, site.layer)


def _refuse_the_head_alone(model: nn.Module, wanted: Sequence[LinearSite], unreachable: Sequence[LeftOut]) -> None:
    if any(site.layer is not None for site in wanted):
        return
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    in_blocks = {id(p): p.numel() for blocks in lists for p in blocks.parameters() if p.dim() > 1}
    hidden = [layer for layer in unreachable if layer.layer is not None]
    apart = sum(site.in_features * site.out_features for site in wanted)
    if max(sum(in_blocks.values()), sum(layer.numbers for layer in hidden)) > apart:
        raise Unsupported(
            f"the blocks of this {type(model).__name__} have no linear layer that an adapter reaches "
            f"({'; '.join(by_reason(hidden)) or 'they hold other kinds of layers'}), only {wanted[0].name!r} beside "
            "them is one: name by `sites` what is to be adapted"
        )


def _warn_of_the_unreachable(model: nn.Module, chosen: Sequence[LinearSite], unreachable: Sequence[LeftOut]) -> None:
    hidden = [layer for layer in unreachable if layer.layer is not None]
    lost, adapted = sum(layer.numbers for layer in hidden), sum(s.in_features * s.out_features for s in chosen)
    if lost > adapted:
        warnings.warn(
            f"{lost / (lost + adapted):.0%} of the matrices in the blocks of this {type(model).__name__} carry no "
            f"adapter: {'; '.join(by_reason(hidden))}",
            stacklevel=3,
        )


def attachment(model: nn.Module) -> Attachment:
    """The handle on a model that carries adapters, such as a deep copy or an unpickled one.

    Raises:
        Unsupported: the model carries none, or several attachments.
    """
    found = attachments(model)
    if len(found) != 1:
        several = f"{len(found)} attachments: take one of moepeft.attachments(model)"
        what = several if found else "no adapters: call attach() on it first"
        raise Unsupported(f"this {type(model).__name__} carries {what}")
    return found[0]


def attachments(model: nn.Module) -> tuple[Attachment, ...]:
    """The handles on all attachments of a model, in the order in which they came."""
    return tuple(Attachment(model, state.number) for state in states_of(model))
