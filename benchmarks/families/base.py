"""What every family of models provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from benchmarks.backbones.adapters import Adapters
from benchmarks.backbones.load import BackboneSource
from benchmarks.families.batch import Batch, Row, Tokens
from benchmarks.instruments.compiler import compiled_call
from benchmarks.protocols.protocol import CompileMode, Protocol
from benchmarks.records.failures import Diverged
from benchmarks.tasks.base import Example, TaskSpec

# A generated answer that is no answer. (NaN is something else: what a diverged model gives.)
UNREADABLE = float("-inf")

RowType = TypeVar("RowType", bound=Row)
BatchType = TypeVar("BatchType", bound=Batch)


@dataclass(frozen=True)
class Answers:
    """What a model says to rows of one task.

    Attributes:
        chosen: class, choice or score of every row, or `UNREADABLE`, of shape (rows,).
        log_probabilities: of every candidate, of shape (rows, candidates), of one that a row lacks minus infinity or
            nearly so; None where there are none: of a generated text, and of scores.
    """

    chosen: Tensor
    log_probabilities: Tensor | None = None


class Model(nn.Module, Generic[BatchType]):
    """A frozen backbone that adapters go onto, and what reads it.

    Attributes:
        backbone: a model of transformers.
        heads: what trains besides the adapters, by task name; empty where answers are text.
        specs: the tasks, in the order of the protocol.
        attachment: the adapters. Set it once they are attached: every row then brings the id of its task.
    """

    def __init__(self, backbone: nn.Module, specs: Sequence[TaskSpec]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict()
        self.specs = tuple(specs)
        self.attachment: Adapters | None = None
        self._compiled: Callable[..., Any] | None = None

    def compile_training(self, mode: CompileMode) -> None:
        """Let the backbone's calls of training run compiled. Call it once adapters are attached."""
        # Not the compiled module itself: it would be registered as one more part of this model.
        self._compiled = partial(compiled_call(self.backbone, mode))

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Inside, nothing is compiled."""
        compiled, self._compiled = self._compiled, None
        try:
            yield
        finally:
            self._compiled = compiled

    @property
    def call(self) -> Callable[..., Any]:
        """The backbone's call; compiled in training where `compile_training` said so."""
        return self._compiled if self.training and self._compiled is not None else self.backbone

    @abstractmethod
    def loss(self, outputs: Any, batch: BatchType) -> Tensor:
        """The task loss, from what a call on a training batch gave."""

    @abstractmethod
    def predict(self, batch: BatchType) -> Answers:
        """The answers to a scoring batch.

        Raises:
            Diverged: what an answer is chosen by is not finite.
        """

    def routing(self, task_ids: Tensor) -> dict[str, Tensor]:
        """The keyword that adapters take out of a call of the backbone; none while it is bare."""
        return {} if self.attachment is None else {"task_ids": task_ids}


def require_numbers(values: Tensor, spec: TaskSpec) -> None:
    """Refuse to choose an answer among values that are no numbers: the highest of them would be the first.

    Raises:
        Diverged: a value is NaN or infinite.
    """
    unusable = int((~values.isfinite().reshape(len(values), -1).all(1)).sum())
    if unusable:
        raise Diverged(f"task {spec.name}: the model's values for {unusable} of {len(values)} rows are NaN or infinite")


@dataclass(frozen=True)
class Family(ABC, Generic[RowType, BatchType]):
    """Makes rows, batches and models of the tasks of one protocol.

    Attributes:
        has_heads: whether heads answer; else the answers are text, and the bare model can be scored.
        protocol: with the length limit and the way of scoring.
        tokenizer: of the backbone.
        specs: the tasks, in the order of the protocol.
    """

    has_heads: ClassVar[bool]

    protocol: Protocol
    tokenizer: Any
    specs: tuple[TaskSpec, ...]

    @abstractmethod
    def encode(self, spec: TaskSpec, indices: Sequence[int], examples: Sequence[Example]) -> tuple[RowType, ...]:
        """Tokenise examples of a task; `indices` are their positions in the split."""

    @abstractmethod
    def training_batch(self, rows: Sequence[tuple[int, RowType]]) -> BatchType:
        """Rows of any tasks, each with the position of its task, and their right answers."""

    @abstractmethod
    def scoring_batch(self, rows: Sequence[tuple[int, RowType]]) -> BatchType:
        """Rows of one task, and whatever is needed to choose their answers."""

    @abstractmethod
    def timing_row(self, tokens: Tokens) -> RowType:
        """A row of these tokens for the timing pass."""

    @abstractmethod
    def load(self, source: BackboneSource, seed: int) -> Model[BatchType]:
        """The model, frozen and on the CPU."""
