"""The flags of ``python -m benchmarks.speed``, and what they resolve to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from benchmarks.protocols.errors import UsageError

# Whatever imports torch is imported where it is needed: `--help` and wrong flags answer at once.
if TYPE_CHECKING:
    from moepeft.protocols import AdapterFactory

Mode = Literal["train", "prefill", "decode", "host"]
Axis = Literal["experts", "rank", "length", "tasks"]
MODES: tuple[Mode, ...] = get_args(Mode)
AT_TRUE_SHAPES: tuple[Mode, ...] = ("train", "prefill", "decode")

DEFAULT_BACKBONE = "minilm"
GROWTH_LAYER = "768x768"


@dataclass(frozen=True)
class Options:
    """Time training and inference of methods beside the bare model and the `peft` package's adapter."""

    backbone: str | None = None
    """minilm, t5-base, deberta-v3-base, llama-2-7b, or one linear layer as INxOUT; default: minilm, and 768x768 with
    --grow."""
    methods: tuple[str, ...] = ("all",)
    """Comma-separated methods, each with or without @preset and fields, e.g. NAME@rank=16+alpha=8; `all` registered
    ones."""
    mode: tuple[Mode, ...] = AT_TRUE_SHAPES
    """What to time; decode needs a model that generates. host, on its own: a training step of 4 x 16 tokens on a model
    of this kind with two layers of width 32, so small that the step is all dispatch."""
    rows: int = 32
    """Sequences per training step."""
    length: int = 64
    """Tokens per sequence."""
    inference_rows: tuple[int, ...] = (1, 16)
    """Batch sizes of prefill and decode."""
    tasks: int = 8
    """Number of tasks the rows belong to."""
    layers: int | None = None
    """Keep only so many layers of the model."""
    sites: tuple[str, ...] | None = None
    """Roles or name ends of the layers to adapt; default: all linear layers of the blocks."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the frozen weights; adapters train in fp32."""
    autocast: bool = True
    """With bf16, run the forward under autocast; without, the reference computes its update in fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    threads: int | None = None
    """Processor threads."""
    compile: bool = False
    """Compile what is called with torch.compile; merged models are left out then."""
    optimiser: bool = False
    """End a training step with a step of AdamW."""
    warmup: int = 3
    """Rounds that do not count."""
    repeats: int = 10
    """Rounds that do."""
    peak_tflops: float | None = None
    """The device's peak at this type in 10^12 operations per second: adds the column MFU."""
    definitions: tuple[str, ...] = ()
    """Also time every method without fast paths: `all` of them at once, or comma-separated definitions one by one, e.g.
    methods.tucka.correct_input."""
    grow: tuple[Axis, ...] = ()
    """Instead, how the time on one layer grows over experts, rank, length or tasks."""
    json: Path | None = None
    """Also write every figure to this file."""
    results: Path = Path("results/speed")
    """Folder whose tables/ gets the Markdown."""

    @property
    def host(self) -> str:
        """Name of the host's shape."""
        return self.backbone or (GROWTH_LAYER if self.grow else DEFAULT_BACKBONE)

    @property
    def tiny(self) -> bool:
        """Whether the host is cut down to two layers of width 32."""
        return "host" in self.mode and not self.grow

    @property
    def autocasts(self) -> bool:
        """Whether the forward runs under autocast."""
        return self.dtype == "bf16" and self.autocast

    @property
    def precision(self) -> str:
        """The types in words."""
        return "bf16 autocast" if self.autocasts else self.dtype

    @property
    def described(self) -> str:
        """The host in words."""
        kept = "" if self.layers is None else f", {self.layers} layer{'s' if self.layers > 1 else ''} of it"
        how = f", {self.dtype}{', compiled' if self.compile else ''}"
        return f"{self.host}{', cut down to width 32' if self.tiny else kept}{how}"

    @property
    def stem(self) -> str:
        """Name of the table's file: what does not compare has a file of its own."""
        parts = ["speed", *(["growth"] if self.grow else []), *(["host"] if self.tiny else []), self.host]
        parts += [] if self.layers is None else [f"{self.layers}layers"]
        parts += ["bf16"] if self.dtype == "bf16" else []
        parts += ["compile"] if self.compile else []
        return "-".join(parts)


def check(options: Options) -> None:
    """Raise `UsageError`, in one line, for a value out of range."""
    from benchmarks.speed.hosts import single_layer

    counts = {"rows": 1, "length": 1, "tasks": 1, "repeats": 1, "threads": 1, "layers": 1, "warmup": 0}
    for name, least in counts.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}: give a whole number from {least} on")
    if any(rows < 1 for rows in options.inference_rows):
        raise UsageError(f"--inference-rows {options.inference_rows}: give whole numbers from 1 on, e.g. 1,16")
    if options.peak_tflops is not None and not 0 < options.peak_tflops < float("inf"):
        raise UsageError(f"--peak-tflops {options.peak_tflops}: give a number above 0")
    if options.tiny and (options.mode != ("host",) or options.layers or single_layer(options.host)):
        raise UsageError("--mode host: give it alone, without --layers, for a model: its shapes are not the true ones")
    if options.compile and set(options.definitions) - {"all"}:
        raise UsageError("--definitions: compiled graphs know all fast paths or none: give `all`, or no --compile")
    if options.grow and single_layer(options.host) is None:
        raise UsageError(f"--grow is measured on one layer: give --backbone as INxOUT, not {options.host!r}")


def configure_methods(options: Options) -> dict[str, AdapterFactory]:
    """The configurations by the names of their rows.

    Raises:
        UsageError: a method or field is unknown, or a value is refused.
    """
    import moepeft
    from benchmarks.methods.parse import configure
    from moepeft.errors import ConfigError, UnknownMethod

    names = [one for name in options.methods for one in (moepeft.available() if name == "all" else (name,))]
    if not names:
        raise UsageError("--methods names no method; leave it out to time all")
    try:
        return {name: configure(name, options.tasks) for name in names}
    except (UnknownMethod, ConfigError) as error:
        raise UsageError(str(error)) from error


def find_definitions(options: Options) -> dict[str, Callable[..., Any] | None]:
    """The definitions by which methods are timed as well, by name; None for all of them at once.

    Raises:
        UsageError: there is no such definition, or it has no fast path.
    """
    found: dict[str, Callable[..., Any] | None] = {}
    for name in options.definitions:
        module, _, function = f"moepeft.{name}".rpartition(".")
        try:
            found[name] = None if name == "all" else getattr(import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"--definitions {name}: {error}") from error
        if found[name] is not None and not hasattr(found[name], "definition"):
            raise UsageError(f"--definitions {name}: it has no fast path; docs/fast-paths.md lists those that have")
    return found
