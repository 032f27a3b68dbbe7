"""Save adapters as safetensors and JSON, and load them only onto the model they were made for. Never pickle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import heads, identity
from .errors import AdapterFileError, NotMergeable
from .files import check_values, read_json, read_tensors, replacing, write_tensors
from .protocols import AdapterFactory
from .registry import from_config
from .shards import whole
from .sites import find_sites
from .state import State
from .trained import TRAINED, check_same, find_values, load_values, of_no_base, read_values

SCHEMA_VERSION = 2
WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"
_KEYS = {"schema_version", "moepeft_version", "method", "config", "base", "sites", "tensors", "train", "trained"}
_KEYS |= {"train_per_task"}


class Saved(NamedTuple):
    """What a folder holds, checked against a model.

    Attributes:
        factory: the method's configuration.
        sites: names of the adapted layers.
        values: of the adapters.
        train: names of the modules that trained beside the adapters.
        train_per_task: names of the modules of which every task trained a copy.
        others: values of what trained beside the adapters, by their names in the model.
    """

    factory: AdapterFactory
    sites: list[str]
    values: dict[str, Tensor]
    train: list[str]
    train_per_task: list[str]
    others: dict[str, Tensor]


def save(state: State, folder: Path) -> None:
    """Write an attachment's weights and description, and what else of the model trains."""
    text = json.dumps(_description(state), indent=1) + "\n"
    files = {WEIGHTS: state.values(), TRAINED: find_values(state)}
    files = {name: {key: whole(value.detach()) for key, value in values.items()} for name, values in files.items()}
    path = folder / CONFIG
    # All are written before any takes its place; the weights do so first, so that no description is there without.
    with ExitStack() as places:
        description = places.enter_context(replacing(path))
        for name, values in files.items():
            if values:
                write_tensors(places.enter_context(replacing(folder / name)), values)
        description.write_text(text, "utf-8")
        if path.is_file() and path.read_bytes() != text.encode():
            # Stopped from here on, other adapters' description must not stand beside weights of the same shapes.
            path.unlink()
        if not files[TRAINED]:  # what a former model left there
            (folder / TRAINED).unlink(missing_ok=True)


def _description(state: State) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "moepeft_version": version("moepeft"),
        "method": state.factory.name,
        "config": dataclasses.asdict(state.factory),  # type: ignore[call-overload]
        "base": state.base or identity.describe(state.model, of_no_base(state.model)),
        "sites": [
            {"name": site.name, "in_features": site.in_features, "out_features": site.out_features}
            for site in state.sites
        ],
        "tensors": _shapes(state.values()),
        "train": list(state.train),
        "train_per_task": list(state.train_per_task),
        "trained": _shapes(find_values(state)),
    }


def _shapes(values: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in values.items()}


def read(model: nn.Module, folder: Path, *, any_base: bool = False) -> Saved:
    """What is to be attached to `model`, checked against it.

    Raises:
        AdapterFileError: anything is wrong with the files or they are for another model.
    """
    description = _read_description(folder)
    factory = _factory(description, folder)
    identity.check(model, description["base"], folder, of_no_base(model), any_base=any_base)
    wanted = _check_sites(model, description["sites"], folder)
    train, per_task = (_check_train(model, description[key], folder) for key in ("train", "train_per_task"))
    # Sizes are compared before anything of that size is made: a file may ask for any rank.
    own = _blueprint(model, factory, wanted, folder)
    if _shapes(own) != description["tensors"]:
        raise AdapterFileError(f"{folder}: {_difference(_shapes(own), description['tensors'])}")
    copies = heads.expected(model, per_task, factory)
    others = read_values(model, folder, description["trained"], copies)
    return Saved(factory, wanted, _read_weights(folder, own), train, per_task, others)


def restore(state: State, folder: Path, *, any_base: bool = False) -> None:
    """Read what `save` wrote into adapters of the same method, configuration and sites; see `Attachment.restore`."""
    if state.merged:
        raise NotMergeable("the adapters are merged, and restored values would not show: unmerge(), or call switch()")
    description = _read_description(folder)
    own = _description(state)
    for key in ("method", "config", "sites", "tensors"):
        # Through JSON, so that a tuple equals the list that was written.
        if description[key] != json.loads(json.dumps(own[key])):
            raise AdapterFileError(
                f"{folder} holds adapters with another {key} than the model's {state.factory}: "
                f"attach the {description['method']} that was saved there, or moepeft.load() it onto a bare model"
            )
    identity.check(state.model, description["base"], folder, of_no_base(state.model), any_base=any_base)
    others = read_values(state.model, folder, description["trained"], {})
    check_same(state, folder, others)
    state.load_values(_read_weights(folder, state.values()))
    load_values(state.model, others)


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    description = read_json(path, missing="give the folder that Attachment.save wrote")
    found = description.get("schema_version")
    if found != SCHEMA_VERSION or isinstance(found, bool):
        raise AdapterFileError(
            f"{path} has schema version {found!r}, this moepeft reads version {SCHEMA_VERSION}: "
            "install the moepeft that wrote it, or save the adapters again"
        )
    if set(description) != _KEYS or any(
        not isinstance(description[key], dict) for key in ("config", "base", "tensors", "trained")
    ):
        raise AdapterFileError(f"{path} must hold exactly {sorted(_KEYS)}, got {sorted(description)}: it is damaged")
    return description


def _factory(description: dict[str, Any], folder: Path) -> AdapterFactory:
    try:
        factory = from_config(description["method"], description["config"])
    except Exception as error:  # whatever a method says or trips over, the values are at fault
        raise AdapterFileError(
            f"{folder / CONFIG}: the method cannot be made from its configuration: {error}"
        ) from error
    missing = {field.name for field in dataclasses.fields(factory)} - set(description["config"])  # type: ignore[arg-type]
    # A former version's method may not have had the field, whose default then stands for what it did.
    if missing and description["moepeft_version"] == version("moepeft"):
        raise AdapterFileError(f"{folder / CONFIG}: the configuration lacks {sorted(missing)}: it is damaged")
    return factory


def _blueprint(model: nn.Module, factory: AdapterFactory, wanted: list[str], folder: Path) -> dict[str, Tensor]:
    """What the adapters' state would be, without memory for it."""
    sites = [site for site in find_sites(model) if site.name in wanted]
    try:
        with torch.device("meta"):
            chosen = factory.select(sites)
            shared = factory.shared(chosen)
            modules = {f"sites.{site.name}": factory.build(site, shared) for site in chosen}
    except Exception as error:  # as above
        raise AdapterFileError(f"{folder}: the adapters cannot be made for this model: {error}") from error
    if [site.name for site in chosen] != wanted:
        raise AdapterFileError(f"{folder / CONFIG}: the list of sites is damaged: {factory.name} adapts other ones")
    if shared is not None:
        modules = {"shared": shared, **modules}
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


def _read_weights(folder: Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The saved values of tensors of the same names, shapes and kinds as `own`."""
    path = folder / WEIGHTS
    state = read_tensors(path, missing="the folder is incomplete, copy it again")
    expected, shapes = _shapes(own), _shapes(state)
    if shapes != expected:
        raise AdapterFileError(f"{path} does not hold what {CONFIG} says: {_difference(expected, shapes)}")
    check_values(path, state, {name: value.dtype for name, value in own.items()})
    return state


def _check_sites(model: nn.Module, saved: Any, folder: Path) -> list[str]:
    try:
        wanted = {entry["name"]: (entry["in_features"], entry["out_features"]) for entry in saved}
    except (TypeError, KeyError) as error:
        raise AdapterFileError(f"{folder / CONFIG}: the list of sites is damaged") from error
    if not isinstance(saved, list) or not saved or len(wanted) != len(saved):
        raise AdapterFileError(f"{folder / CONFIG}: the list of sites is damaged: empty, or a site stands twice")
    own = {site.name: (site.in_features, site.out_features) for site in find_sites(model)}
    for name, (inputs, outputs) in wanted.items():
        shape = own.get(name)
        if shape != (inputs, outputs):
            raise AdapterFileError(
                f"{folder} adapts {name!r} of shape {inputs} -> {outputs}, the model has "
                + (f"shape {shape[0]} -> {shape[1]} there" if shape else "no such layer")
                + ": it is another architecture"
            )
    return list(wanted)


def _check_train(model: nn.Module, saved: Any, folder: Path) -> list[str]:
    modules = {name for name, _ in model.named_modules()}
    if not isinstance(saved, list) or not all(isinstance(name, str) and name in modules for name in saved):
        raise AdapterFileError(f"{folder} trained the modules {saved}, of which the model has not all: load that model")
    return list(saved)


def _difference(wanted: dict[str, list[int]], got: dict[str, list[int]]) -> str:
    for name in sorted({*wanted, *got}):
        if wanted.get(name) != got.get(name):
            return f"tensor {name!r} should have shape {wanted.get(name)}, got {got.get(name)}"
    return "no difference"
