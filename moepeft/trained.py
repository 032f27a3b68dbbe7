"""What trains beside the adapters, such as a new classification head: saved, loaded and restored with the adapters.

`moepeft.attach` freezes the model but for what `train` names. A parameter that is unfrozen afterwards trains along as
well. Without the values of both the adapters would answer through a random head.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import AdapterFileError, NoMatchingSite, Unsupported, did_you_mean
from .files import check_values, read_tensors
from .identity import find_new
from .shards import laid_out
from .sites import LinearSite, is_ours
from .state import State, states_of

TRAINED = "trained.safetensors"
_WITH_LABELS = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)")


# ---------------------------------------------------------------------- which modules


def find_modules(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Full names of the modules that `train` means.

    Args:
        model: the bare model.
        names: dotted names, or last components of dotted names; a component means every module that ends so.

    Raises:
        NoMatchingSite: no module with parameters has such a name.
        Unsupported: its weights are quantised.
    """
    if isinstance(names, str):
        raise NoMatchingSite(f"train={names!r} is one string: give a list of names of modules, train=[{names!r}]")
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and not is_ours(name) and any(True for _ in module.parameters())
    }
    found: dict[str, None] = {}
    for wanted in names:
        matching = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        if not matching:
            raise NoMatchingSite(
                f"train names {wanted!r}, but no module with parameters has that name or that last component: give a "
                f"name of model.named_modules().{did_you_mean(wanted, (name for name, _ in model.named_children()))}"
            )
        for name in matching:
            if not all(parameter.is_floating_point() for parameter in modules[name].parameters()):
                raise Unsupported(f"train names {name!r}, whose weights are quantised and cannot train: leave it out")
        found.update(dict.fromkeys(matching))
    return tuple(found)


def is_beneath(name: str, modules: Iterable[str]) -> bool:
    """Whether the module or tensor `name` is one of `modules` or lies in one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def unfreeze(model: nn.Module, modules: Iterable[str]) -> None:
    """Let the parameters of the named modules train."""
    for name in modules:
        model.get_submodule(name).requires_grad_(True)


def warn_of_new_heads(state: State, *, asked: bool) -> None:
    """Name what no checkpoint had and what stays frozen nevertheless.

    transformers marks a parameter whose value came from a checkpoint. Where a model has no mark at all, made from a
    configuration or by an older release, a head for labels counts as new unless the caller was `asked` what trains.
    """
    model = state.model
    frozen = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if state.trained_before.get(name) and not parameter.requires_grad
        if not _is_adapted(name, state.sites) and not is_beneath(name, state.train_per_task)
    ]
    unread = find_new(model)
    body = f"{getattr(model, 'base_model_prefix', '')}."
    read = any(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters())
    if read:
        new = [name for name, _ in frozen if name in unread]
    elif not asked and _WITH_LABELS.search(type(model).__name__):
        new = [name for name, _ in frozen if not name.startswith(body)]
    else:
        new = []
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in new))
    if modules:
        warnings.warn(
            f"{', '.join(modules)} of this {type(model).__name__} "
            + ("came from no checkpoint" if read else "may be new")
            + f" and would stay frozen: attach(..., train={modules!r}) trains and saves them with the adapters"
            + ("" if read else "; train=[] says that they are trained already"),
            stacklevel=3,
        )


def _is_adapted(name: str, sites: Iterable[LinearSite]) -> bool:
    return is_beneath(name, (site.carrier for site in sites))


# ---------------------------------------------------------------------- their values


def find_others(state: State) -> dict[str, nn.Parameter]:
    """The trainable parameters that are no adapters, by name."""
    trainable = {
        name: parameter
        for name, parameter in state.model.named_parameters()
        if parameter.requires_grad and not is_ours(name)
    }
    neighbours = state.neighbours
    if not neighbours:
        return trainable
    # What nobody named by `train` belongs to the attachment that came first.
    first = state.number < min(other.number for other in neighbours)
    own, theirs = _named(state), [name for other in neighbours for name in _named(other)]
    return {
        name: parameter
        for name, parameter in trainable.items()
        if is_beneath(name, own) or (first and not is_beneath(name, theirs))
    }


def _named(state: State) -> tuple[str, ...]:
    return (*state.train, *state.train_per_task)


def owners(state: State) -> tuple[str, ...]:
    """Names of the modules that train beside the adapters: those that `train` named, and others' that were unfrozen."""
    named = _named(state)
    others = (name.rpartition(".")[0] for name in find_others(state))
    return (*named, *dict.fromkeys(name for name in others if not is_beneath(name, named)))


def find_values(state: State) -> dict[str, Tensor]:
    """These parameters, and the buffers that a training forward changes beside them, as a batch norm's."""
    others = find_others(state)
    owners = {name.rpartition(".")[0] for name in others}
    buffers = {
        name: buffer
        for name, buffer in state.model.named_buffers()
        if not is_ours(name) and (name.rpartition(".")[0] in owners or is_beneath(name, _named(state)))
    }
    kept = state.model.state_dict() if buffers else {}
    return {**others, **{name: buffer for name, buffer in buffers.items() if name in kept}}


def of_no_base(model: nn.Module) -> set[str]:
    """Names of parameters that say nothing of the base.

    They train beside the adapters of some attachment, have heads per task in their place, or are merged into.
    """
    found: set[str] = set()
    for state in states_of(model):
        changed = (*state.train_per_task, *(site.carrier for site in state.sites if state.merged))
        found |= {*find_others(state), *(name for name, _ in model.named_parameters() if is_beneath(name, changed))}
    return found


def read_values(
    model: nn.Module, folder: Path, shapes: Mapping[str, list[int]], copies: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The saved values, checked against what their description says and against `model`.

    Args:
        model: adapted already, or bare.
        folder: where they were saved.
        shapes: what the description says.
        copies: what stands for the heads per task that a bare model will get.

    Raises:
        AdapterFileError: the file is missing or damaged, or for another model.
    """
    path = folder / TRAINED
    if not shapes and not path.exists():
        return {}
    saved = read_tensors(path, missing="the folder is incomplete, copy it again")
    found = {name: list(value.shape) for name, value in saved.items()}
    if found != dict(shapes):
        raise AdapterFileError(f"{path} holds {found}, its description says {dict(shapes)}: copy the folder again")
    own = {**dict(model.named_parameters()), **dict(model.named_buffers()), **copies}
    for name, value in saved.items():
        shape = tuple(own[name].shape) if name in own else None
        if shape != tuple(value.shape):
            raise AdapterFileError(f"{path} holds {name!r} of shape {tuple(value.shape)}, the model has {shape} there")
    check_values(path, saved, {name: own[name].dtype for name in saved})
    return saved


def check_same(state: State, folder: Path, saved: Mapping[str, Tensor]) -> None:
    """Refuse values of other tensors than those that the model trains.

    Raises:
        AdapterFileError: the two sets differ.
    """
    own = find_values(state)
    if set(own) != set(saved):
        raise AdapterFileError(
            f"{folder / TRAINED} holds {sorted(saved) or 'nothing'}, but the model trains {sorted(own) or 'nothing'} "
            "beside its adapters: name in attach(train=...) what was trained then"
        )


@torch.no_grad()
def load_values(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give the tensors their values; the parameters among them train from now on."""
    own = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for name, value in saved.items():
        if isinstance(own[name], nn.Parameter):
            own[name].requires_grad_(True)
        own[name].copy_(laid_out(value, own[name]))
