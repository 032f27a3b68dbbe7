"""What trains, in groups by purpose, as torch's optimisers take them: for rates and decay of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .config import purpose
from .errors import ConfigError
from .state import State
from .trained import find_others

# What `moepeft.config.Purpose` calls a parameter -> its group.
_GROUPS = {"core": "experts", "router": "router", "task_table": "task_tables"}
NAMES = (*_GROUPS.values(), "heads")


def parameter_groups(state: State, options: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """See `moepeft.attachment.Attachment.parameter_groups`."""
    unknown = sorted(set(options) - set(NAMES))
    if unknown:
        raise ConfigError(f"there is no group {unknown[0]!r} of parameters: give options for {', '.join(NAMES)}")
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in NAMES}
    for _, module in state.modules():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                groups[_GROUPS[purpose(state.factory, name)]].append(parameter)
    groups["heads"] = list(find_others(state).values())
    return [
        {"params": parameters, "name": name, **options.get(name, {})}
        for name, parameters in groups.items()
        if parameters
    ]
