"""From flags to what is timed."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

import moepeft
from benchmarks.protocols.protocol import UsageError
from benchmarks.speed.growth import AXES, Axis
from benchmarks.speed.hosts import kind_of, single_layer
from benchmarks.speed.workloads import MODES, Mode, Workload, supports
from moepeft.errors import ConfigError, UnknownMethod
from moepeft.protocols import AdapterFactory

if TYPE_CHECKING:
    from benchmarks.speed.__main__ import Options

DEFAULT_BACKBONE = "minilm"
GROWTH_LAYER = "768x768"

Twin = Callable[[AdapterFactory], AdapterFactory]
Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Settings:
    """Checked flags.

    Attributes:
        options: as they were given.
        backbone: name of the shape.
        entries: configurations by the names of their rows; a naive twin follows its original.
        twins: which of the names are naive twins.
        sites: roles or name ends, None for all.
        modes: what to time.
        inference_rows: batch sizes of prefill and decode.
        axes: along which to measure growth; empty for the comparison.
    """

    options: Options
    backbone: str
    entries: Mapping[str, AdapterFactory]
    twins: frozenset[str]
    sites: tuple[str, ...] | None
    modes: tuple[Mode, ...]
    inference_rows: tuple[int, ...]
    axes: tuple[Axis, ...]

    def workloads(self, host: nn.Module) -> list[Workload]:
        """All that the host can do of what was asked for.

        Raises:
            UsageError: it can do none of it.
        """
        options, kind = self.options, kind_of(host)
        autocast = options.dtype == "bf16" and options.autocast
        found = [
            Workload(mode, rows, options.length, options.tasks, autocast, options.optimiser)
            for mode in self.modes
            if supports(kind, mode)
            for rows in ((options.rows,) if mode == "train" else self.inference_rows)
        ]
        if not found:
            raise UsageError(f"--mode {options.mode}: {self.backbone} does not generate; give train or prefill")
        return found

    def training(self) -> Workload:
        """The training step that growth is measured on."""
        options = self.options
        autocast = options.dtype == "bf16" and options.autocast
        return Workload("train", options.rows, options.length, options.tasks, autocast, options.optimiser)

    @property
    def described(self) -> str:
        """The host in words."""
        layers = self.options.layers
        kept = "" if layers is None else f", {layers} layer{'s' if layers > 1 else ''} of it"
        how = f", {self.options.dtype}{', compiled' if self.options.compile else ''}"
        return f"{self.backbone}{kept}{how}"

    @property
    def stem(self) -> str:
        """Name of the table's file, without the device: what would not compare has a file of its own."""
        options = self.options
        parts = ["speed", *(["growth"] if self.axes else []), self.backbone]
        parts += [] if options.layers is None else [f"{options.layers}layers"]
        parts += ["bf16"] if options.dtype == "bf16" else []
        parts += ["compile"] if options.compile else []
        return "-".join(parts)


def resolve(options: Options) -> Settings:
    """Check the flags; raises `UsageError` in one line."""
    _check_counts(options)
    axes = tuple(_one_of(word, AXES, "--grow") for word in _words(options.grow or ""))
    backbone = options.backbone or (GROWTH_LAYER if axes else DEFAULT_BACKBONE)
    if axes and single_layer(backbone) is None:
        raise UsageError(f"--grow is measured on one layer: give --backbone as INxOUT, not {backbone!r}")
    modes = tuple(mode for mode in MODES if mode in [_one_of(word, MODES, "--mode") for word in _words(options.mode)])
    inference_rows = tuple(_positive(word) for word in _words(options.inference_rows))
    entries, twins = _entries(options)
    sites = None if options.sites is None else tuple(_words(options.sites))
    return Settings(options, backbone, entries, twins, sites, modes, inference_rows, axes)


def _check_counts(options: Options) -> None:
    for name in ("rows", "length", "tasks", "repeats", "threads", "layers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: give a whole number from 1 on")
    if options.warmup < 0:
        raise UsageError(f"--warmup {options.warmup}: give a whole number from 0 on")
    if options.peak_tflops is not None and not 0 < options.peak_tflops < float("inf"):
        raise UsageError(f"--peak-tflops {options.peak_tflops}: give a number above 0")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _one_of(word: str, allowed: tuple[Name, ...], flag: str) -> Name:
    for name in allowed:
        if name == word:
            return name
    raise UsageError(f"{flag} {word}: there is {', '.join(allowed)}")


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise UsageError(f"--inference-rows {word}: give whole numbers from 1 on, separated by commas, e.g. 1,16")
    return int(word)


# ---------------------------------------------------------------------- methods


def _entries(options: Options) -> tuple[dict[str, AdapterFactory], frozenset[str]]:
    names = [one for name in _words(options.methods) for one in (moepeft.available() if name == "all" else (name,))]
    if not names:
        raise UsageError(f"--methods {options.methods!r} names no method; leave it out to time all")
    fields = parse_fields(options.fields)
    for name in fields:
        if name not in names:
            raise UsageError(f"--fields {name}: it is not among the methods {', '.join(names)}; write it as there")
    naive = {} if options.naive is None else _import(options.naive)
    entries, twins = {}, set()
    for name in names:
        try:
            factory = moepeft.method(name, num_tasks=options.tasks, **fields.get(name, {}))
        except (UnknownMethod, ConfigError) as error:
            raise UsageError(str(error)) from error
        entries[name] = factory
        if factory.name in naive:
            twin = f"{name} (naive)"
            entries[twin] = naive[factory.name](factory)
            twins.add(twin)
    return entries, frozenset(twins)


def parse_fields(text: str) -> dict[str, dict[str, Any]]:
    """``name:key=value,name:key=value`` as name -> key -> value; values are Python literals, else words."""
    found: dict[str, dict[str, Any]] = {}
    # A comma inside a value, as of a tuple, is not followed by the next name and a colon.
    for part in re.split(r",(?=[\w@.-]+:)", text) if text.strip() else []:
        match = re.fullmatch(r"\s*([\w@.-]+):(\w+)=(.+?)\s*", part)
        if match is None:
            raise UsageError(f"--fields {part!r}: write name:key=value, several separated by commas")
        name, key, value = match.groups()
        try:
            found.setdefault(name, {})[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word
            found.setdefault(name, {})[key] = value
    return found


def _import(target: str) -> Mapping[str, Twin]:
    module, _, name = target.partition(":")
    try:
        value = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--naive {target}: {error}; give MODULE:NAME that can be imported from here") from error
    if not isinstance(value, Mapping):
        raise UsageError(
            f"--naive {target} is a {type(value).__name__}; give a mapping from a method's name to a function"
        )
    return value
