"""Tiny architectures of transformers, built from their configurations alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from .configurations import Host, decoders, encoders, images, others, pairs

HOSTS: dict[str, Host] = {**encoders(), **decoders(), **pairs(), **images(), **others()}


def build(name: str, seed: int = 0) -> nn.Module:
    """The architecture with random weights, in eval mode, without dropout: the same for the same seed."""
    host = HOSTS[name]
    config = transformers.AutoConfig.for_model(name, **host.options)
    _without_dropout(config)
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, host.auto).from_config(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.Linear):  # as in a trained model, no layer hides what goes through it
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    # Frozen as attach() freezes it: where a weight wants gradients torch multiplies by another kernel.
    return model.eval().requires_grad_(False)


def _without_dropout(config: Any) -> None:
    """No dropout, and no layer left out by chance (layerdrop)."""
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            _without_dropout(value)
        elif "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
