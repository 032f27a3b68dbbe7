"""Whose a weight is: an update may go into a weight that belongs to one layer alone and is a plain parameter.

A weight that another layer reads as well (tied embeddings) would change that layer too. A weight that is computed at
every call (weight_norm, spectral_norm, other parametrizations, pruning) would be computed anew, without the update.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from .errors import NotMergeable
from .fused import ExpertMatrix
from .heads import HEADS
from .shards import is_sharded
from .state import State

Owned = tuple[str, nn.Module, Tensor]
"""A tensor of a model: its name, the module that it is a parameter or buffer of, and the tensor."""


def check_weights(state: State) -> None:
    """Whether everything that merging writes to is a plain parameter of its module alone.

    Raises:
        NotMergeable: it is not; names the layer and who else reads the weight.
    """
    tensors = [
        (f"{name}.{key}" if name else key, module, tensor)
        for name, module in state.model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and not tensor.is_meta
    ]
    owners: dict[int, list[Owned]] = {}
    for owned in tensors:
        owners.setdefault(owned[2].untyped_storage().data_ptr(), []).append(owned)
    for site in state.sites:
        module = state.layer(site)
        weight: Tensor = module.weight  # type: ignore[assignment]
        if is_sharded(weight):
            raise NotMergeable(
                f"the weight of {site.name!r} is sharded over processes: save(), then load() onto a whole base and "
                "merge there"
            )
        owner, parameter = _owner(module)
        if parameter not in owner._parameters:
            raise NotMergeable(
                f"the weight of {site.name!r} is computed at every call (a parametrization, weight_norm, "
                "spectral_norm or pruning), so an update would be lost: make it permanent first "
                "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove), or leave the site out"
            )
        _check_alone(site.name, weight, owner._parameters[parameter], owner, _beside(weight, owners))
    for name in state.train_per_task:
        inside = [owned for owned in tensors if owned[0].startswith(f"{name}.") and HEADS not in owned[0].split(".")]
        for full, owner, tensor in inside:
            _check_alone(full.rpartition(".")[0], tensor, tensor, owner, _beside(tensor, owners))


def _beside(weight: Tensor, owners: dict[int, list[Owned]]) -> Iterable[Owned]:
    place = weight.untyped_storage().data_ptr()
    return owners.get(place, []) if place else []  # 0: memory that nobody sees, as of a test


def _check_alone(name: str, weight: Tensor, own: Tensor | None, owner: nn.Module, others: Iterable[Owned]) -> None:
    for full, other, tensor in others:
        if (other is not owner or tensor is not own) and _overlap(weight, tensor):
            raise NotMergeable(
                f"the weight of {name!r} is also that of {full!r}, which merging would change: leave {name!r} out, or "
                "untie the weights first"
            )


def _owner(module: nn.Module) -> tuple[nn.Module, str]:
    """The module whose parameter a layer's weight is, and the parameter's name."""
    return (module.experts, module.parameter) if isinstance(module, ExpertMatrix) else (module, "weight")


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage share an element; told by their first and last ones."""
    ends = [
        tensor.storage_offset()
        + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        for tensor in (one, other)
    ]
    return one.storage_offset() <= ends[1] and other.storage_offset() <= ends[0]
