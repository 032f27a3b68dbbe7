"""A fixed update as one LoRA: the adapter's own factors, or those of a singular value decomposition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moepeft.protocols import LoRAShaped, Mergeable


@dataclass(frozen=True)
class Factors:
    """One site's update as a product, scale * B A.

    Attributes:
        A: (r, in_features).
        B: (out_features, r).
        scale: factor of the product.
        error: Frobenius norm of what the product lacks, over that of the update; 0 where nothing was cut.
    """

    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]
    scale: float
    error: float

    @property
    def rank(self) -> int:
        """Number r of rank-one terms."""
        return self.A.shape[0]


@torch.no_grad()
def factorise(adapter: nn.Module, task: int | None, rank: int | None) -> Factors:
    """The factors of an adapter's update for a task.

    Args:
        adapter: a `Mergeable` one.
        task: which task's update; None for methods that know no tasks.
        rank: of the product; None for as many terms as the update has.

    Returns:
        The nearest product of that rank in the Frobenius norm (Eckart and Young, 1936). A product of a rank below
        the wanted one is padded with zeros, so that all sites have the wanted rank.
    """
    if isinstance(adapter, LoRAShaped):
        A, B = adapter.lora_factors(task)
        if rank is None or rank >= A.shape[0]:
            return _padded(A, B, adapter.scale, rank)
    assert isinstance(adapter, Mergeable), f"{type(adapter).__name__} says that it merges but has no delta_weight"
    return truncate(adapter.delta_weight(task), rank)


def truncate(update: Float[Tensor, "o i"], rank: int | None) -> Factors:
    """The nearest product of a given rank; None for the update's own rank up to rounding."""
    # In double precision: what is cut must be the update's, not the decomposition's rounding.
    U, S, V = torch.linalg.svd(update.double(), full_matrices=False)
    largest = float(S[0])
    rounding = torch.finfo(update.dtype).eps * max(update.shape) * largest
    own = max(1, int((rounding < S).sum()))
    kept = own if rank is None else min(rank, own)
    root = S[:kept].sqrt()
    A, B = root[:, None] * V[:kept], U[:, :kept] * root
    error = float(S[kept:].norm() / S.norm()) if largest and kept < own else 0.0
    product = _padded(A.to(update.dtype), B.to(update.dtype), 1.0, rank)
    return Factors(product.A, product.B, 1.0, error)


def _padded(A: Tensor, B: Tensor, scale: float, rank: int | None) -> Factors:
    missing = 0 if rank is None else max(0, rank - A.shape[0])
    if missing:
        A, B = nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))
    return Factors(A, B, scale, 0.0)
