"""One validated record per cell: what was run, how it ended, what it scored, what it cost."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final, Literal

from pydantic import ConfigDict, Field

from benchmarks.protocols.frozen import Frozen
from benchmarks.protocols.protocol import NUMERICS_VERSION, Protocol

SCHEMA_VERSION: Final = 3

Status = Literal["ok", "diverged", "oom", "timeout", "unsupported", "error", "interrupted"]


class _Strict(Frozen):
    # A diverged run has NaN in its curve: JSON knows no NaN, and null would not validate when read back.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Tuning(_Strict):
    """How the learning rate of a reported cell was found."""

    unwritten = frozenset({"more_seeds", "first_steps", "extensions"})

    rates: tuple[float, ...] = Field(description="the rates of the first grid, rising")
    seed: int = Field(description="of the trials")
    more_seeds: tuple[int, ...] = Field((), description="further ones, each with all trials")
    steps: int = Field(description="of a trial, on the last rung")
    first_steps: int | None = Field(None, description="of a trial on the first rung; None: there was one rung")
    extensions: int = Field(0, description="how often the grid was allowed to grow")
    head_learning_rate: float | None = Field(
        description="the rate of the heads beside an adapter, as the heads' own rate is tuned where they train alone"
    )

    @property
    def seeds(self) -> tuple[int, ...]:
        """All tuning seeds."""
        return (self.seed, *self.more_seeds)


class Cell(_Strict):
    """What decides a result: the resolved protocol, the rows, the method with every default, the seed.

    Two cells with equal content are the same cell: its id is the SHA-256 of the canonical JSON. Paths and hardware
    are left out on purpose, so that a record keeps its name on another machine.
    """

    protocol: Protocol
    data: dict[str, str] = Field(description="task name -> SHA-256 of its rows")
    method: str = Field(description="as written on the command line: name or name@preset")
    config: dict[str, Any] = Field(description="the method's resolved configuration; empty for the baselines")
    seed: int
    tuned: Tuning | None = Field(None, description="None: every method has the rate of the protocol")
    trial: bool = Field(False, description="a run that a learning rate is chosen by, not a reported one")
    numerics_version: int = NUMERICS_VERSION

    @property
    def id(self) -> str:
        """First 16 hexadecimal digits of the content hash."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Budget(_Strict):
    """What a run consumed; compared across methods, a difference is an error."""

    order_hash: str = Field(description="SHA-256 over the tokenised training rows in the order they were seen")
    steps: int
    rows: int = Field(description="training examples seen; a multiple-choice row counts once")
    sequences: int = Field(description="token sequences seen; a multiple-choice row counts once per choice")
    tokens: int = Field(description="tokens without padding")
    padded_tokens: int = Field(description="tokens with padding")
    rows_per_task: dict[str, int]
    optimiser: str | None = Field(default=None, description="what the optimiser did, as it says after the last step")


class Parameters(_Strict):
    """Trainable numbers. `adapter` excludes the task heads, which every method shares."""

    adapter: int
    adapter_closed_form: int
    adapter_shared: int = Field(description="the part of `adapter` owned by all sites together")
    heads: int
    base: int = Field(description="frozen numbers of the backbone")
    sites: int
    tasks: int
    added_by_task: int | None = Field(
        None, description="numbers of `adapter` that one more task adds, by the closed form; None where none is known"
    )
    mergeable: bool | None = Field(
        None, description="whether merging leaves the plain model, with no number more; None where it is not known"
    )

    @property
    def adapter_per_task(self) -> float:
        """Trainable adapter numbers divided by the number of tasks, the papers' convention."""
        return self.adapter / self.tasks


class Likelihood(_Strict):
    """What the probabilities of a run say on one task, in nats per row (`benchmarks/cells/likelihood.py`)."""

    nll: float = Field(description="mean negative log-likelihood of what is true")
    prior_nll: float = Field(description="the same of a guess that knows the training labels alone")
    calibration_error: float | None = Field(
        description="expected difference of confidence and accuracy over ten bins; None for scores"
    )

    @property
    def skill(self) -> float:
        """1 - NLL / NLL(prior): 1 is certainty, 0 is the prior."""
        return 1 - self.nll / self.prior_nll


class Score(_Strict):
    """The figures of one task. A metric that is undefined (a constant prediction, say) is None with a note."""

    unwritten = frozenset({"likelihood"})

    metrics: dict[str, float | None]
    primary: str = Field(description="the metric that is averaged over tasks")
    rows: int
    note: str | None = None
    likelihood: Likelihood | None = Field(None, description="None of answers without probabilities: generated text")

    def counted(self, metric: str) -> float:
        """The figure as tables, comparisons and tuning count it: one that is undefined is no skill at all, 0."""
        return self.metrics[metric] or 0.0


class Quantiles(_Strict):
    """Distribution of a repeated timing, in seconds."""

    median: float
    p10: float
    p90: float
    repeats: int


class Timing(_Strict):
    """Seconds by phase, and a separate timing pass (warm-up excluded, device synchronised)."""

    setup_seconds: float
    train_seconds: float = Field(description="the optimiser steps alone")
    evaluate_seconds: float
    train_step: Quantiles | None = None
    inference_step: Quantiles | None = None
    train_tokens_per_second: float | None = Field(None, description="tokens without padding, from `train_step`")
    inference_tokens_per_second: float | None = None
    train_over_bare: float | None = Field(
        None, description="median of `train_step` over the bare model's forward, which took turns with it"
    )
    inference_over_bare: float | None = Field(None, description="the same of `inference_step`")
    own_share: float | None = Field(
        None, description="processor time of the timing pass over wall time x threads; None on an accelerator"
    )
    others_share: float | None = Field(
        None, description="of the cores this process may use, the share that others took during the timing pass"
    )


class Memory(_Strict):
    """Peak memory of the timing pass."""

    peak_bytes: int | None
    kind: str = Field(description="what was measured: 'CUDA allocator' or 'tensors alive at once'")


class CurvePoint(_Strict):
    """One logged training step; `losses` holds the task loss and every auxiliary loss by name."""

    step: int
    losses: dict[str, float]
    learning_rate: float
    gradient_norm: float


class Checkpoint(_Strict):
    """Scores of a run on its way, each a valid end of it."""

    step: int
    seconds: float = Field(description="of training until then, without any scoring")
    rows: dict[str, int] = Field(description="rows scored, by task; the same at every checkpoint")
    metrics: dict[str, float] = Field(description="first metric by task, 0 where it is undefined")
    skills: dict[str, float] = Field(description="1 - NLL / NLL(prior) by task; empty without probabilities")


class SiteRouting(_Strict):
    """Which experts one adapted layer used for which task: lists by task, in the order of `Routing.tasks`."""

    site: str
    role: str
    layer: int | None
    weights: list[list[float]] = Field(description="mean weight of every expert")
    shares: list[list[float]] = Field(description="share of the choices that fell on every expert; 0: never chosen")
    entropy: list[float] = Field(description="mean entropy of a single choice's weights, in nats")


class EmbeddingMap(_Strict):
    """The task embeddings of one site on the plane of their first two principal components."""

    site: str
    points: list[list[float]] = Field(description="two coordinates per task")
    explained: list[float] = Field(description="share of the variance along each of the two")


class TaskEmbeddings(_Strict):
    """What training made of the tasks' embeddings."""

    cosine: list[list[float]] = Field(description="cosine between tasks, mean over sites")
    maps: list[EmbeddingMap] = Field(description="of the first, the middle and the last site")


class Routing(_Strict):
    """How a trained method routes the first evaluation rows of every task; numbers to four significant digits."""

    tasks: list[str]
    rows: dict[str, int] = Field(description="rows looked at, by task")
    batch_rows: int = Field(description="rows per forward pass")
    sites: list[SiteRouting] = Field(description="sites that record no weights of experts are left out")
    embeddings: TaskEmbeddings | None = None


class Swapped(_Strict):
    """What a method that is routed by task ids scores under every id."""

    tasks: list[str]
    rows: dict[str, int] = Field(description="rows scored, by task")
    skills: list[list[float]] = Field(
        description="1 - NLL / NLL(prior): the rows of a task (outer) under the id of a task (inner), own heads"
    )

    @property
    def lost(self) -> float:
        """Mean skill that a wrong id costs; 0: the routing is decoration."""
        number = len(self.tasks)
        right = sum(row[at] for at, row in enumerate(self.skills)) / number
        wrong = sum(sum(row) - row[at] for at, row in enumerate(self.skills)) / (number * (number - 1))
        return right - wrong


class Provenance(_Strict):
    """Where and with what a record was made."""

    commit: str | None
    dirty: bool | None
    packages: dict[str, str]
    python: str
    platform: str
    device: str
    threads: int
    precision: str
    deterministic: bool
    started_utc: str
    command: str


class RunRecord(_Strict):
    """Everything known of one cell. `status` other than ``ok`` keeps what there was and says why in `reason`."""

    unwritten = frozenset({"checkpoints", "swapped"})

    schema_version: Literal[3] = SCHEMA_VERSION
    cell: Cell
    status: Status
    reason: str | None = None
    traceback: str | None = None
    budget: Budget | None = None
    parameters: Parameters | None = None
    scores: dict[str, Score] = Field(default_factory=dict, description="by task name")
    timing: Timing | None = None
    memory: Memory | None = None
    curve: list[CurvePoint] = Field(default_factory=list)
    checkpoints: list[Checkpoint] = Field(default_factory=list)
    backbone: str | None = Field(None, description="one line: model, parameters, revision, what it was trained on")
    sources: dict[str, str] = Field(default_factory=dict, description="task name -> where its rows come from")
    routing: Routing | None = Field(None, description="None for what has no experts")
    swapped: Swapped | None = Field(None, description="None for what ids do not route")
    outcomes: str | None = Field(None, description="file name of the per-example outcomes (parquet)")
    provenance: Provenance

    @property
    def train_step(self) -> Quantiles | None:
        """Step times of the timing pass; None if there was none."""
        return self.timing.train_step if self.timing is not None else None
