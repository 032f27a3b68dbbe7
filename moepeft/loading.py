"""Attach saved adapters: of whatever folder the library writes, or of the hub."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from . import saving
from .attach import Attachment, attach
from .errors import AdapterFileError
from .hub import find_folder
from .trained import load_values


def load(model: nn.Module, folder: str | Path, *, any_base: bool = False) -> Attachment:
    """Attach saved adapters to `model`, with the values of what else was trained.

    Args:
        model: the base model, bare, of the architecture the adapters were made for.
        folder: what `Attachment.save`, the Trainer or `export_lora` wrote, or ``owner/name`` or ``owner/name@revision``
            of the hub. An export is read as the method `lora`; it does not say which base it is for.
        any_base: accept a base with other weights, of the same class. Where the base lies never matters.

    Raises:
        AdapterFileError: anything is wrong with the files or they are for another model; `model` is untouched.
        Unsupported: an export has layers of several ranks.
    """
    place = find_folder(folder)
    if not (place / saving.CONFIG).exists():
        from .bridges import peft_checkpoints  # imports a method, which `import moepeft` does not

        if (place / peft_checkpoints.CONFIG).exists():
            return peft_checkpoints.import_lora(model, place)
        inside = sorted(path.parent.name for path in place.glob(f"*/{saving.CONFIG}"))
        if inside:
            raise AdapterFileError(f"{place} holds no adapters itself, its folders do: give one of {', '.join(inside)}")
    saved = saving.read(model, place, any_base=any_base)
    adapters = attach(
        model,
        saved.factory,
        sites=lambda site: site.name in saved.sites,
        train=saved.train,
        train_per_task=saved.train_per_task,
    )
    try:
        adapters.load_state_dict(saved.values)
    except BaseException:
        adapters.detach()
        raise
    load_values(model, saved.others)
    return adapters
