"""What all methods of a comparison share: frozen, validated objects read from a TOML file.

A `Protocol` decides the result of a run, together with the method's own configuration and the seed. A `Suite` is a
protocol, the seeds it is run with and the learning rates that are tried first.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeGuard, TypeVar

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, model_validator

from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.frozen import Frozen

PROTOCOL_FOLDER = Path(__file__).parent

# Raise it whenever a change of this package changes the numbers a run gives: old records are then not reused.
NUMERICS_VERSION = 2

Precision = Literal["auto", "fp32", "bf16"]
Family = Literal["encoder", "seq2seq", "causal"]
Pooling = Literal["mean", "first", "last"]
CompileMode = Literal["default", "max-autotune-no-cudagraphs"]
Scoring = Literal["likelihood", "likelihood_per_token", "generate"]
ProtocolType = TypeVar("ProtocolType", bound="Protocol")


class TimingPlan(Frozen):
    """Fixed shapes of the timing pass, so that no method is timed on kinder rows than another."""

    warmup: PositiveInt = 3
    repeats: PositiveInt = 10
    rows: PositiveInt = Field(default=32, description="sequences per step")
    length: PositiveInt = Field(default=32, description="tokens per sequence, none of them padding")


class Protocol(Frozen):
    """Tasks, backbone, data order, optimiser, precision and measurement of a run; all of it decides the result."""

    unwritten = frozenset(
        {
            "averaging",
            "batches",
            "checkpoint_rows",
            "checkpoints",
            "compiled",
            "endpoint",
            "endpoint_tasks",
            "head_start",
            "head_start_rows",
            "heads",
            "pooling",
            "prompt",
            "scarce_rows",
            "schedule",
            "test_rows",
            "trial_length",
            "warmup",
        }
    )

    name: str = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=1)
    backbone: str = Field(default="minilm", min_length=1)
    family: Family = Field(
        default="encoder",
        description="encoder: pooled states and a head per task; seq2seq and causal: answers as text, no heads",
    )
    pooling: Pooling = Field(
        default="mean",
        description="of an encoder's hidden states: the mean over the tokens, or the state of the first or last token",
    )
    heads: Literal["own", "shared"] = Field(
        default="own", description="one per task, or one for all: then tasks of one kind can contradict each other"
    )
    task_prefix: bool = Field(
        default=False, description="whether every text begins with its task's name, so that it tells the task"
    )
    prompt: Literal["listed", "cloze"] = Field(
        default="listed",
        description="of a multiple-choice row whose answer is text: lists the choices, or ends where each would follow",
    )
    scoring: Scoring = Field(
        default="likelihood",
        description="of text answers: log-probability of every candidate, in all or per token, or greedy decoding",
    )
    base_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="type of the frozen weights; adapters train in single precision"
    )

    steps: PositiveInt
    batch_size: PositiveInt = Field(default=32, description="rows per step; a multiple-choice row counts once")
    learning_rate: PositiveFloat = 2e-3
    head_learning_rate: PositiveFloat | None = Field(default=None, description="None: the same as `learning_rate`")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="not applied to vectors and scalars")
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.06, description="share of the steps over which the rate rises"
    )
    warmup: PositiveInt | None = Field(
        default=None, description="the same in steps, however many steps there are; None: by `warmup_ratio`"
    )
    schedule: Literal["linear", "constant"] = Field(
        default="linear", description="of the rate after warm-up: linearly to zero, or constant"
    )
    averaging: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="decay of the average of weights that is scored; None: the last weights are scored"
    )
    checkpoints: tuple[PositiveInt, ...] = Field(
        default=(), description="steps at which a run is scored on the way; those beyond its end do not count"
    )
    checkpoint_rows: PositiveInt | None = Field(
        default=None, description="rows per task of these scores, the same each time; None: all that are scored"
    )
    head_start: Literal["random", "ridge"] = Field(
        default="random", description="of the heads: random, or a converged fit on the frozen model's features"
    )
    head_start_rows: PositiveInt = Field(default=2_000, description="training rows per task of that fit")
    clip_norm: PositiveFloat = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=0.0, description="every dropout rate of the backbone; None: as its configuration has them"
    )

    batches: Literal["mixed", "single"] = Field(
        default="mixed", description="of training: every row draws its task, or every batch draws one for all its rows"
    )
    length_window: PositiveInt = Field(
        default=8, description="steps whose rows are sorted by length and cut into batches anew; 1: no sorting"
    )
    max_length: Annotated[int, Field(ge=8)] = 128
    trial_length: Annotated[int, Field(ge=8)] | None = Field(default=None, description="max_length of trials, if other")
    train_rows: PositiveInt | None = Field(
        default=None, description="a seeded subset of this size per task; None: all rows"
    )
    scarce_rows: PositiveInt | None = Field(
        default=None, description="the same for tasks of the endpoint, where they are to learn from the others"
    )
    test_rows: PositiveInt | None = Field(
        default=None, description="test sets of fewer rows are filled from the training rows; None: official splits"
    )
    eval_rows: PositiveInt | None = Field(default=None, description="the same for the reported rows")
    evaluate_on: Literal["reported", "fold"] = Field(
        default="reported", description="fold: rows cut from the training rows, for choosing anything at all"
    )
    fold_rows: PositiveInt = Field(default=300, description="rows per task in that fold, never more than a fifth")
    eval_batch_size: PositiveInt = Field(default=64, description="rows per batch of one task, sorted by length")
    precision: Precision = "auto"
    compiled: CompileMode | None = Field(
        default=None, description="mode of torch.compile of training steps; None: eager, as scores are in any case"
    )

    endpoint: Literal["metric", "skill"] = Field(
        default="metric",
        description="what methods are compared by, as a mean over tasks: the first metric of every task, or the skill "
        "1 - NLL / NLL(prior); declared before a run",
    )
    endpoint_tasks: tuple[str, ...] = Field(
        default=(), description="tasks that the endpoint is a mean over; empty: all that are trained"
    )
    reference: str | None = Field(default=None, description="method that speed and scores are compared with")
    equivalence_band: PositiveFloat = Field(
        default=0.5, description="points of the mean score; a difference that lies within counts as none"
    )
    track: Literal["as-published", "matched"] = Field(
        default="as-published", description="matched: by ranks all methods have about as many parameters"
    )
    target_parameters: PositiveInt | None = Field(
        default=None, description="trainable adapter numbers of the matched track; None: as many as the reference has"
    )
    log_every: PositiveInt = 10
    timing: TimingPlan = TimingPlan()

    @model_validator(mode="after")
    def _lists_without_duplicates(self) -> Self:
        for field, values in self:
            twice = sorted({str(value) for value in values if values.count(value) > 1}) if _is_list(values) else []
            if twice:
                raise ValueError(f"{field} lists {', '.join(twice)} twice")
        return self

    @model_validator(mode="after")
    def _endpoint_over_tasks_that_are_trained(self) -> Self:
        others = [name for name in self.endpoint_tasks if name not in self.tasks]
        if others:
            raise ValueError(f"endpoint_tasks names {', '.join(others)}, which tasks does not list")
        if self.scarce_rows is not None and not self.endpoint_tasks:
            raise ValueError("scarce_rows needs endpoint_tasks, the tasks that have few rows: see --suite transfer")
        return self

    @model_validator(mode="after")
    def _curve_whose_points_are_ends(self) -> Self:
        if self.checkpoints and self.schedule != "constant":
            raise ValueError("checkpoints are ends of a run, which they are under schedule = constant alone")
        if self.prompt != "listed" and self.family == "encoder":
            raise ValueError(f"prompt = {self.prompt} is for answers as text, which family = encoder does not give")
        if self.head_start != "random" and self.family != "encoder":
            raise ValueError(f"head_start = {self.head_start} is for family = encoder: answers as text have no heads")
        if self.heads != "own" and (self.head_start != "random" or self.family != "encoder"):
            raise ValueError(
                "heads = shared is for family = encoder with head_start = random: no fit tells tasks apart"
            )
        return self

    @model_validator(mode="after")
    def _prefix_that_changes_something(self) -> Self:
        if self.task_prefix and self.family == "seq2seq":
            raise ValueError("task_prefix changes nothing with family = seq2seq, whose prompts name their task already")
        return self

    @model_validator(mode="after")
    def _pooled_where_heads_read(self) -> Self:
        if self.pooling != "mean" and self.family != "encoder":
            raise ValueError(f"pooling = {self.pooling} is for family = encoder: text answers pool nothing")
        return self

    @model_validator(mode="after")
    def _matched_to_something(self) -> Self:
        if self.track == "matched" and self.target_parameters is None and self.reference is None:
            raise ValueError("track = matched needs target_parameters, or a reference method whose size is the target")
        if self.track != "matched" and self.target_parameters is not None:
            raise ValueError("target_parameters is for track = matched")
        return self

    def for_trial(self, steps: int) -> Self:
        """The same for choosing a rate: as many steps, scored once, at their end, on the fold."""
        cut = self.with_overrides(steps=steps, evaluate_on="fold", checkpoints=(), max_length=self.trial_length)
        return cut.model_copy(update={"trial_length": None})

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return round(self.warmup_ratio * self.steps) if self.warmup is None else self.warmup

    @property
    def examinations(self) -> tuple[int, ...]:
        """Steps after which a run is scored for its curve: the checkpoints and the end; none without checkpoints."""
        if not self.checkpoints:
            return ()
        return (*sorted(step for step in self.checkpoints if step < self.steps), self.steps)

    def with_overrides(self, **overrides: Any) -> Self:
        """A copy with the given fields replaced and validated; fields that are None stay as they are."""
        changes = {name: value for name, value in overrides.items() if value is not None}
        return _validate(type(self), {**self.model_dump(), **changes}, f"protocol {self.name}")


class Suite(Protocol):
    """A protocol, the seeds it is run with, and how every method's learning rate is chosen before that."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    tuning_rates: tuple[PositiveFloat, ...] = Field(
        default=(), description="learning rates that every method tries on the fold; empty: `learning_rate` for all"
    )
    tuning_seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(1000,), min_length=1, description="of the trials; never reported seeds"
    )
    tuning_steps: PositiveInt | None = Field(default=None, description="steps of a trial; None: `steps`")
    tuning_first_steps: PositiveInt | None = Field(
        default=None, description="of a first rung, whose better half goes on to `tuning_steps`; None: one rung"
    )
    tuning_extensions: Annotated[int, Field(ge=0)] = Field(
        default=0, description="how often the grid may grow until the best rate lies inside of it"
    )

    @model_validator(mode="after")
    def _tuned_apart_from_what_is_reported(self) -> Self:
        both = sorted({*self.tuning_seeds} & {*self.seeds})
        if self.tuning_rates and both:
            raise ValueError(f"tuning_seeds {both[0]} is among the reported seeds; give another one")
        if self.tuning_rates and self.evaluate_on == "fold":
            raise ValueError("tuning scores its trials on the fold: with evaluate_on = fold nothing is left to report")
        return self

    @property
    def protocol(self) -> Protocol:
        """What every run of the suite shares, without seeds and tuning."""
        return Protocol.model_validate(self.model_dump(include=set(Protocol.model_fields)))


def available_suites() -> tuple[str, ...]:
    """Names of the protocol files that come with the project."""
    return tuple(sorted(path.stem for path in PROTOCOL_FOLDER.glob("*.toml")))


def load_suite(suite: str) -> Suite:
    """Read a suite by its name or by the path of a TOML file.

    Raises:
        UsageError: no such suite, unreadable TOML, an unknown field or a value out of range.
    """
    path = PROTOCOL_FOLDER / f"{suite}.toml"
    if suite not in available_suites():
        path = Path(suite)
        if path.suffix != ".toml" or not path.is_file():
            raise UsageError(
                f"unknown suite {suite!r}: give {', '.join(available_suites())} or the path of a TOML file"
            )
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a TOML file: {error}") from error
    return _validate(Suite, {"name": path.stem, **fields}, str(path))


def _is_list(value: object) -> TypeGuard[tuple[object, ...]]:
    return isinstance(value, tuple)


def _validate(kind: type[ProtocolType], fields: dict[str, Any], where: str) -> ProtocolType:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, one['loc'])) or 'fields'}: {one['msg']}"
            + ("" if isinstance(one["input"], dict | Protocol) else f", got {one['input']!r}")
            for one in error.errors()
        )
        raise UsageError(f"{where}: {'; '.join(problems)}") from error
