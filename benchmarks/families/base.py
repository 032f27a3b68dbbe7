"""What every family of models provides."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from benchmarks.backbones.load import BackboneSource
from benchmarks.families.batch import Batch, Row
from benchmarks.methods.peft import PeftAttachment
from benchmarks.protocols.protocol import Protocol as RunProtocol
from benchmarks.tasks.base import Example, TaskSpec
from moepeft import Attachment

AnyAttachment = Attachment | PeftAttachment

# A generated answer that is no answer. (NaN is something else: what a diverged model gives.)
UNREADABLE = float("-inf")


class Model(nn.Module):
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
        self.attachment: AnyAttachment | None = None

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The task loss, from what a call on a training batch gave."""

    @abstractmethod
    def predict(self, batch: Batch) -> Tensor:
        """Class, choice or score of every row of a scoring batch, or `UNREADABLE`."""

    def routing(self, task_ids: Tensor) -> dict[str, Tensor]:
        """The keyword that adapters take out of a call of the backbone; none while it is bare."""
        return {} if self.attachment is None else {"task_ids": task_ids}


class Family(Protocol):
    """Makes rows, batches and models."""

    @property
    def has_heads(self) -> bool:
        """Whether heads answer; else the answers are text, and the bare model can be scored."""
        ...

    def encode(
        self, spec: TaskSpec, indices: Sequence[int], examples: Sequence[Example], tokenizer: Any, max_length: int
    ) -> tuple[Row, ...]:
        """Tokenise examples of a task; `indices` are their positions in the split."""
        ...

    def training_batch(self, rows: Sequence[tuple[int, Row]], specs: Sequence[TaskSpec], pad_token_id: int) -> Batch:
        """Rows of any tasks, each with the position of its task, and their right answers."""
        ...

    def scoring_batch(self, rows: Sequence[tuple[int, Row]], specs: Sequence[TaskSpec], pad_token_id: int) -> Batch:
        """Rows of one task, and whatever is needed to choose their answers."""
        ...

    def timing_row(self, ids: tuple[int, ...], *, segments: bool) -> Row:
        """A row of these tokens for the timing pass."""
        ...

    def load(
        self, source: BackboneSource, specs: Sequence[TaskSpec], protocol: RunProtocol, seed: int, tokenizer: Any
    ) -> Model:
        """The model, frozen and on the CPU."""
        ...
