"""Tensors of which every process holds one shard (FSDP2): the whole of one, and one laid out like another."""

from __future__ import annotations

from torch import Tensor


def is_sharded(value: Tensor) -> bool:
    """Whether it is a ``DTensor``, told without importing torch's package for them, which takes its time."""
    return hasattr(value, "device_mesh")


def whole(value: Tensor) -> Tensor:
    """All of a tensor of which this process may hold one shard; then every process must ask for it."""
    full: Tensor = value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
    return full


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """`value`, if `like` is sharded as a tensor sharded alike, with the first process's numbers on all of them."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]
