"""What the benchmark asks of adapters on a backbone, whoever made them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from moepeft.counting import ParameterCount


class Adapters(Protocol):
    """A handle on a model that carries adapters, such as `moepeft.Attachment`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything of the adapters that trains."""
        ...

    def aux_losses(self) -> Mapping[str, Tensor]:
        """Auxiliary losses of the last forward by name, coefficients included."""
        ...

    def after_step(self) -> None:
        """Tell the adapters that the optimiser has made a step."""
        ...

    def route(self, *, task_ids: Tensor) -> AbstractContextManager[None]:
        """Inside, every call of the model has these task ids, one per row."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the model computes what it computes without adapters."""
        ...

    def parameter_count(self) -> ParameterCount:
        """Trainable numbers, as measured and in closed form."""
        ...
