"""Which base model adapters were made for: its class, and samples of its frozen matrices. Never a path.

A path says where a copy lies, not what it holds. Samples tell a base from its fine-tuned relatives wherever either of
them lies, in whatever precision it was loaded. Parts that were quantised since cannot be compared and are passed over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdapterFileError
from .shards import whole
from .sites import SLOT
from .weights import has_numbers

_MATRICES, _VALUES = 64, 4
_STEP = 2654435761  # Knuth's multiplicative hash: positions far apart in a matrix of any size


def describe(model: nn.Module, trained: Collection[str] = ()) -> dict[str, Any]:
    """What a file says of the base.

    Args:
        model: the base, its weights not merged.
        trained: names of parameters that train beside the adapters, which are no part of the base's identity.
    """
    config = getattr(model, "config", None)
    return {
        "class": _class_name(model),
        "id": _name_of(getattr(config, "_name_or_path", None)),
        "revision": getattr(config, "_commit_hash", None),
        "samples": {name: _sample(parameter) for name, parameter in _sampled(model, trained)},
    }


def _name_of(source: str | None) -> str | None:
    """What the base was loaded by; of a folder its name alone, since a path says nothing to others."""
    if not source:
        return None
    return Path(source).name if Path(source).is_absolute() or Path(source).exists() else source


def check(
    model: nn.Module, saved: Mapping[str, Any], folder: Path, changed: Collection[str] = (), *, any_base: bool
) -> None:
    """Whether `model` is the base that `describe` saw.

    Args:
        model: the base, bare or with attachments.
        saved: what `describe` gave.
        folder: where that stands.
        changed: names of parameters that attachments have changed since.
        any_base: whether a base of the same class is enough.

    Raises:
        AdapterFileError: it is not, or the description is damaged.
    """
    if saved.get("class") != _class_name(model):
        raise AdapterFileError(
            f"{folder} was made for a {saved.get('class')}, got a {_class_name(model)}: load that model"
        )
    if any_base:
        return
    own, ignored = dict(model.named_parameters()), {*find_new(model), *changed}
    try:
        samples = {name: sample for name, sample in saved["samples"].items() if name not in ignored}
        different = [name for name, sample in samples.items() if not _agrees(own.get(name), sample)]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise AdapterFileError(f"{folder}: the description of the base model is damaged: {error!r}") from error
    if different:
        raise AdapterFileError(
            f"{folder} was made on a base model ({saved.get('id') or 'without a name'}) with other weights: "
            f"{len(different)} of {len(samples)} sampled matrices differ, {different[0]!r} for one. Load that "
            "base, or pass any_base=True if the adapters shall serve on this one"
        )


def find_new(model: nn.Module) -> set[str]:
    """Names of parameters that no checkpoint had, where transformers read one; it marks those that it read."""
    marks = {name: getattr(value, "_is_hf_initialized", False) for name, value in model.named_parameters()}
    return (
        {name for name, marked in marks.items() if not marked and SLOT not in name.split(".")}
        if any(marks.values())
        else set()
    )


def _sampled(model: nn.Module, trained: Collection[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Some frozen matrices with values, spread evenly over the model. What no checkpoint had is not the base's."""
    new = find_new(model)
    matrices = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.numel() and has_numbers(parameter) and not parameter.is_meta
        if SLOT not in name.split(".") and name not in trained and name not in new
    ]
    step = max(1, -(-len(matrices) // _MATRICES))
    yield from matrices[::step]


def _sample(parameter: Tensor) -> dict[str, Any]:
    values = _values(parameter)
    dtype = str(parameter.dtype).removeprefix("torch.")
    return {"shape": list(parameter.shape), "dtype": dtype, "values": values.nan_to_num().tolist()}


def _values(parameter: Tensor) -> Tensor:
    """A few values, in double precision: exact for every narrower type."""
    flat = whole(parameter.detach()).flatten()
    places = torch.tensor([(index * _STEP + 1) % flat.numel() for index in range(_VALUES)], device=flat.device)
    return flat[places].double().cpu()


def _agrees(own: Tensor | None, sample: Mapping[str, Any]) -> bool:
    """Whether a parameter is the sampled one, rounded or not; one without values to compare is."""
    if own is None:
        return False
    if own.is_meta or not has_numbers(own):
        return True
    saved, found = torch.tensor(sample["values"], dtype=torch.float64), _values(own).nan_to_num()
    if list(own.shape) != sample["shape"] or saved.shape != found.shape:
        return False
    kind = getattr(torch, sample["dtype"])
    if own.dtype in (torch.float16, torch.bfloat16) and kind in (torch.float16, torch.bfloat16) and own.dtype != kind:
        return torch.allclose(found, saved, rtol=2**-7, atol=1e-6)  # two roundings of one base
    # Rounding goes from the wider of the two types to the narrower, as loading in that type does.
    rounded, as_found = saved.to(own.dtype).double(), found.to(kind).double()
    return torch.equal(rounded, found) or torch.equal(as_found, saved)


def _class_name(model: nn.Module) -> str:
    # Sharded, a model is of a new class that derives from FSDPModule and from its own.
    kind, *bases = type(model), *type(model).__bases__
    return (bases[1] if bases[0].__name__ == "FSDPModule" else kind).__name__
