"""Save adapters as safetensors and JSON, and load them only onto the model they were made for. Never pickle."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import AdapterFileError, MoepeftError
from .protocols import LinearSite
from .registry import from_config
from .sites import find_sites

if TYPE_CHECKING:
    from .attach import Attachment

SCHEMA_VERSION = 1
WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"
_KEYS = {"schema_version", "moepeft_version", "method", "config", "base", "sites", "tensors"}


def save(attachment: Attachment, folder: Path) -> None:
    """Write an attachment's weights and description."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().contiguous().cpu() for name, value in attachment.state_dict().items()}
    description = _description(attachment)
    # Each file appears whole or not at all; the description comes last, so that it never describes missing weights.
    partial = folder / f"{WEIGHTS}.tmp"
    save_file(state, partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS)
    partial = folder / f"{CONFIG}.tmp"
    partial.write_text(json.dumps(description, indent=1) + "\n")
    partial.replace(folder / CONFIG)


def _description(attachment: Attachment) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "moepeft_version": version("moepeft"),
        "method": attachment.factory.name,
        "config": dataclasses.asdict(attachment.factory),  # type: ignore[call-overload]
        "base": _base(attachment.model),
        "sites": [
            {"name": site.name, "in_features": site.in_features, "out_features": site.out_features}
            for site in attachment.sites
        ],
        "tensors": {name: list(value.shape) for name, value in attachment.state_dict().items()},
    }


def load(model: nn.Module, folder: str | Path, *, any_base: bool = False) -> Attachment:
    """Attach the adapters saved in `folder` to `model`.

    Args:
        model: the base model, bare, of the architecture the adapters were made for.
        folder: where `Attachment.save` wrote.
        any_base: accept a base with another id or revision, of the same architecture.

    Raises:
        AdapterFileError: anything is wrong with the files or they are for another model; `model` is untouched.
    """
    from .attach import attach

    folder = Path(folder)
    description = _read_description(folder)
    try:
        factory = from_config(description["method"], description["config"])
    except (MoepeftError, TypeError) as error:
        raise AdapterFileError(
            f"{folder / CONFIG}: the method cannot be made from its configuration: {error}"
        ) from error
    _check_base(model, description["base"], folder, any_base=any_base)
    wanted = _check_sites(model, description["sites"], folder)
    state = _read_weights(folder, description["tensors"])

    attachment = attach(model, factory, sites=lambda site: site.name in wanted)
    try:
        own = {name: list(value.shape) for name, value in attachment.state_dict().items()}
        if own != description["tensors"]:
            raise AdapterFileError(f"{folder}: {_difference(own, description['tensors'])}")
        attachment.load_state_dict(state)
    except BaseException:
        attachment.detach()
        raise
    return attachment


def restore(attachment: Attachment, folder: str | Path) -> None:
    """Give adapters the values saved in `folder` by adapters of the same method, configuration and sites.

    The modules stay, and so do the optimisers and wrappers that hold their parameters.

    Raises:
        AdapterFileError: anything is wrong with the files, or they are for other adapters; nothing was changed.
    """
    folder = Path(folder)
    description = _read_description(folder)
    own = _description(attachment)
    for key in ("method", "config", "sites", "tensors"):
        # Through JSON, so that a tuple equals the list that was written.
        if description[key] != json.loads(json.dumps(own[key])):
            raise AdapterFileError(
                f"{folder} holds adapters with another {key} than the model's {attachment.factory}: "
                f"attach the {description['method']} that was saved there, or moepeft.load() it onto a bare model"
            )
    _check_base(attachment.model, description["base"], folder, any_base=False)
    attachment.load_state_dict(_read_weights(folder, description["tensors"]))


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise AdapterFileError(f"{path} does not exist: give the folder that Attachment.save wrote") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterFileError(
            f"{path} is not readable JSON ({error}): it is damaged, save the adapters again"
        ) from error
    found = description.get("schema_version") if isinstance(description, dict) else None
    if found != SCHEMA_VERSION:
        raise AdapterFileError(
            f"{path} has schema version {found!r}, this moepeft reads version {SCHEMA_VERSION}: "
            "install the moepeft that wrote it, or save the adapters again"
        )
    if set(description) != _KEYS or not all(isinstance(description[k], dict) for k in ("config", "base", "tensors")):
        raise AdapterFileError(f"{path} must hold exactly {sorted(_KEYS)}, got {sorted(description)}: it is damaged")
    return dict(description)


def _read_weights(folder: Path, expected: dict[str, list[int]]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        state = load_file(path)
    except FileNotFoundError as error:
        raise AdapterFileError(f"{path} does not exist: the folder is incomplete, copy it again") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{path} is not a whole safetensors file ({error}): copy it again") from error
    shapes = {name: list(value.shape) for name, value in state.items()}
    if shapes != expected:
        raise AdapterFileError(f"{path} does not hold what {CONFIG} says: {_difference(expected, shapes)}")
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise AdapterFileError(
                f"{path}: {name} holds values that are not finite; the training that made it diverged"
            )
    return state


def _base(model: nn.Module) -> dict[str, str | None]:
    config = getattr(model, "config", None)
    return {
        "class": type(model).__name__,
        "id": getattr(config, "_name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
    }


def _check_base(model: nn.Module, saved: dict[str, Any], folder: Path, *, any_base: bool) -> None:
    own = _base(model)
    if saved.get("class") != own["class"]:
        raise AdapterFileError(f"{folder} was made for a {saved.get('class')}, got a {own['class']}: load that model")
    for key in ("id", "revision"):
        if not any_base and saved.get(key) and own[key] and saved[key] != own[key]:
            raise AdapterFileError(
                f"{folder} was made on the base model with {key} {saved[key]!r}, got {own[key]!r}: load that one, or "
                "pass any_base=True if you know that the weights are the same"
            )


def _check_sites(model: nn.Module, saved: Any, folder: Path) -> set[str]:
    try:
        wanted = [LinearSite(entry["name"], entry["in_features"], entry["out_features"]) for entry in saved]
    except (TypeError, KeyError) as error:
        raise AdapterFileError(f"{folder / CONFIG}: the list of sites is damaged") from error
    own = {site.name: (site.in_features, site.out_features) for site in find_sites(model)}
    for site in wanted:
        shape = own.get(site.name)
        if shape != (site.in_features, site.out_features):
            raise AdapterFileError(
                f"{folder} adapts {site.name!r} of shape {site.in_features} -> {site.out_features}, the model has "
                + (f"shape {shape[0]} -> {shape[1]} there" if shape else "no such layer")
                + ": it is another architecture"
            )
    return {site.name for site in wanted}


def _difference(wanted: dict[str, list[int]], got: dict[str, list[int]]) -> str:
    for name in sorted({*wanted, *got}):
        if wanted.get(name) != got.get(name):
            return f"tensor {name!r} should have shape {wanted.get(name)}, got {got.get(name)}"
    return "no difference"
