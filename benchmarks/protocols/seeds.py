"""Independent random streams, one per purpose, hashed from names.

A method that draws twice as many numbers at initialisation must not shift the order of the data: so no stream
continues another one, and equal names give equal streams for every method.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream(*names: str | int) -> int:
    """A seed in [0, 2**63) that depends on all names and on their order."""
    # Lengths go in too: ("a", "bc") and ("ab", "c") are different streams.
    text = "".join(f"{len(str(name))}:{name}" for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*names: str | int) -> np.random.Generator:
    """A numpy generator of its own for these names."""
    return np.random.default_rng(stream(*names))


@contextmanager
def torch_stream(*names: str | int) -> Iterator[None]:
    """Inside, torch draws on the CPU from the stream of these names; afterwards its state is what it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(*names))
        yield
