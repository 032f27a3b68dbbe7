"""What trains beside the adapters, such as a new classification head: saved, loaded and restored with the adapters.

`moepeft.attach` freezes the model. A parameter that is unfrozen afterwards trains along. Without its values the
adapters would answer through a random head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import AdapterFileError
from .files import check_values, read_tensors, replacing, write_tensors
from .shards import laid_out, whole
from .state import SLOT

TRAINED = "trained.safetensors"


def find_others(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters that are no adapters, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and SLOT not in name.split(".")
    }


def save_others(model: nn.Module, folder: Path) -> None:
    """Write them; where there are none, remove what a former model left there."""
    values = {name: whole(parameter.detach()) for name, parameter in find_others(model).items()}
    if values:
        with replacing(folder / TRAINED) as partial:
            write_tensors(partial, values)
    else:
        (folder / TRAINED).unlink(missing_ok=True)


def read_others(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What `save_others` wrote, checked against `model`; empty if nothing else trained.

    Raises:
        AdapterFileError: the file is damaged, or for another model.
    """
    path = folder / TRAINED
    if not path.exists():
        return {}
    saved = read_tensors(path, missing="copy the folder again")
    parameters = dict(model.named_parameters())
    for name, value in saved.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        if shape != tuple(value.shape):
            raise AdapterFileError(f"{path} holds {name!r} of shape {tuple(value.shape)}, the model has {shape} there")
    check_values(path, saved, {name: parameters[name].dtype for name in saved})
    return saved


def check_same(model: nn.Module, folder: Path, saved: Mapping[str, Tensor]) -> None:
    """Refuse values of other parameters than those that `model` trains.

    Raises:
        AdapterFileError: the two sets differ.
    """
    others = find_others(model)
    if set(others) != set(saved):
        raise AdapterFileError(
            f"{folder / TRAINED} holds {sorted(saved) or 'nothing'}, but the model trains "
            f"{sorted(others) or 'nothing'} beside its adapters: unfreeze after attach() what was trained then"
        )


@torch.no_grad()
def load_others(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give the parameters their values; they train from now on."""
    parameters = dict(model.named_parameters())
    for name, value in saved.items():
        parameters[name].requires_grad_(True)
        parameters[name].copy_(laid_out(value, parameters[name]))
