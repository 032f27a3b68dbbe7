"""Make a method's modules for chosen sites: first values, and new ones in place."""

from __future__ import annotations

import torch
from torch import nn

from .errors import Unsupported
from .protocols import AdapterFactory
from .sites import LinearSite
from .state import State, load_module, weight_of


def why_not(factory: AdapterFactory, site: LinearSite) -> str | None:
    """Why the method cannot route a site's input; None if it can.

    A table of positions belongs to no row. An expert gets tokens without their rows. Where one parameter holds all
    experts, a token's task is known, but neither its neighbours nor the row's padding. Where experts are modules of
    their own, the code of the model deals the tokens out, and nothing is known of them.
    """
    capabilities = factory.capabilities
    if site.regrouped and capabilities.routing != "none":
        return f"a layer of an expert, which gets tokens without their rows: not for {factory.name}"
    if site.of_positions and capabilities.routing != "none" and not capabilities.adapts_positions:
        return "fed by positions, which are of no row"
    if site.fused is not None and capabilities.routing not in ("none", "task"):
        return f"an expert's matrix, which gets tokens without their rows: not for {factory.name}"
    return None


def build(factory: AdapterFactory, sites: tuple[LinearSite, ...]) -> tuple[nn.Module | None, list[nn.Module]]:
    """What all sites share, and an adapter for each of them, with first values."""
    shared = factory.shared(sites)
    return shared, [factory.build(site, shared) for site in sites]


@torch.no_grad()
def reset(state: State) -> None:
    """Draw the adapters anew and in place: parameters, buffers and constants.

    Raises:
        Unsupported: an adapted layer is on the meta device still.
    """
    home = weight_of(state.layer(state.sites[0])).device
    if home.type == "meta":
        raise Unsupported("the model is on the meta device: give it memory first, by model.to_empty(device=...)")
    state.runtime.take_tallies()
    shared, built = build(state.factory, state.sites)
    for (_, module), drawn in zip(state.modules(), [*([] if shared is None else [shared]), *built], strict=True):
        if on_meta(module):  # memory was given to the base alone
            module.to_empty(device=home)
        load_module(module, drawn.state_dict())
        constants = dict(drawn.named_buffers())
        for key, buffer in module.named_buffers():
            buffer.copy_(constants[key])
    state.without_values = None


def on_meta(module: nn.Module) -> bool:
    """Whether the module was made without memory."""
    return any(parameter.is_meta for parameter in module.parameters())


def check_values(state: State) -> None:
    """Refuse adapters that were attached on the meta device and have memory but no values."""
    if state.without_values is not None and not next(state.without_values.parameters()).is_meta:
        raise Unsupported(
            "the adapters were attached on the meta device and to_empty() gave them memory but no values: call "
            "reset_parameters() on their attachment, then load what there is to load"
        )
