"""Put a method's adapters around a model's frozen layers, and read saved ones. `moepeft.hooks` says how."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from . import building, saving
from .attachment import Attachment, attachment
from .errors import AlreadyAttached, Unsupported
from .hooks import install
from .protocols import AdapterFactory
from .shards import is_sharded
from .sites import SitePattern, find_sites, select_sites
from .state import SLOT, State

__all__ = ["Attachment", "attach", "attachment", "load"]


def attach(model: nn.Module, factory: AdapterFactory, sites: SitePattern | None = None) -> Attachment:
    """Freeze `model` and put the method's adapters around its linear layers.

    Args:
        model: any module with linear layers. Its own `forward` is what the user goes on calling.
        factory: the method's configuration, e.g. ``EPT(rank=8, num_tasks=8)``.
        sites: which layers; see `moepeft.sites.select_sites`. None: all linear layers of the repeated blocks.

    Raises:
        NoMatchingSite: `sites` matches nothing.
        Unsupported: the method cannot work on this model, or its weights are sharded already.
        AlreadyAttached: the model has adapters.
    """
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise Unsupported(
            "the model's weights are sharded, and its processes would train other adapters each: attach first, then "
            "shard the model with them; saved values are read by their restore() afterwards"
        )
    if any(hasattr(module, SLOT) for module in model.modules()):
        raise AlreadyAttached("the model has adapters already: call detach() on their attachment first")
    chosen = tuple(factory.select(select_sites(find_sites(model), sites)))
    if not chosen:
        raise Unsupported(f"{factory.name} can adapt none of the chosen layers")
    shared, built = building.build(factory, chosen)
    state = State(model, factory, chosen, shared)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    install(model, state, built)
    if building.on_meta(built[0]):
        state.without_values = built[0]
    return Attachment(model)


def load(model: nn.Module, folder: str | Path, *, any_base: bool = False) -> Attachment:
    """Attach the adapters saved in `folder` to `model`.

    Args:
        model: the base model, bare, of the architecture the adapters were made for.
        folder: where `Attachment.save` wrote.
        any_base: accept a base with another id or revision, of the same architecture.

    Raises:
        AdapterFileError: anything is wrong with the files or they are for another model; `model` is untouched.
    """
    factory, wanted, values = saving.read(model, Path(folder), any_base=any_base)
    adapters = attach(model, factory, sites=lambda site: site.name in wanted)
    try:
        adapters.load_state_dict(values)
    except BaseException:
        adapters.detach()
        raise
    return adapters
