"""Time contestants in turns, A B C A B C, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.cells.timing_pass import keep_free_memory
from benchmarks.cells.train import synchronise
from benchmarks.protocols.seeds import generator
from benchmarks.records.schema import Quantiles

RESAMPLES = 2000
CONFIDENCE = 0.95

Mark = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Step:
    """What is timed.

    Attributes:
        label: names it.
        run: the work.
        prepare: what must happen before each run and is not timed.
        around: the state in which the work is done; entered before and left after each turn, not timed.
    """

    label: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    around: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of every timed round by label, and why a step is not among them."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times the reference's time: the median over rounds and its 95 % interval."""

    estimate: float
    low: float
    high: float


def interleave(steps: Sequence[Step], *, warmup: int, repeats: int, device: torch.device, settle: int = 0) -> Timings:
    """Give every step its turn, round after round.

    Args:
        steps: a step that raises is left out from then on; the others go on.
        warmup: rounds that do not count.
        repeats: rounds that do.
        device: whose clock to use.
        settle: untimed runs before each timed one, for steps whose `around` leaves cold caches.
    """
    labels = [step.label for step in steps]
    if len(set(labels)) != len(labels):
        raise ValueError(f"steps must have different labels, got {labels}")
    marks: dict[str, list[Mark]] = {label: [] for label in labels}
    failures: dict[str, Exception] = {}
    keep_free_memory(device)
    with collecting_between_rounds():
        for number in range(warmup + repeats):
            gc.collect()  # what a round leaves behind is not collected within a later step
            first = number % len(steps) if steps else 0  # the first of a round finds colder caches: not always the same
            for step in (*steps[first:], *steps[:first]):
                if step.label in failures:
                    continue
                outcome = _turn(step, device, settle)
                if isinstance(outcome, Exception):
                    failures[step.label] = outcome
                elif number >= warmup:
                    marks[step.label].append(outcome)
        synchronise(device)
    seconds = {label: [mark() for mark in marks[label]] for label in labels if label not in failures}
    return Timings(seconds, failures)


def _turn(step: Step, device: torch.device, settle: int) -> Mark | Exception:
    """One turn; the error if there is one: a contestant that fails becomes a row that says why."""
    try:
        with step.around():
            for _ in range(settle):
                step.prepare()
                step.run()
            step.prepare()
            return _clocked(step.run, device)
    except Exception as error:
        return error


def _clocked(work: Callable[[], object], device: torch.device) -> Mark:
    if device.type == "cuda":
        # Read at the very end: waiting after each step would add the launch of its kernels to its time.
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        return lambda: float(start.elapsed_time(end)) / 1e3
    begun = time.perf_counter()
    work()
    seconds = time.perf_counter() - begun
    return lambda: seconds


@contextmanager
def collecting_between_rounds() -> Iterator[None]:
    """Inside, garbage is collected when asked for only, and what was there before is not looked through again."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def quantiles(seconds: Sequence[float]) -> Quantiles:
    """Median, p10 and p90."""
    low, median, high = map(float, np.percentile(seconds, (10, 50, 90)))
    return Quantiles(median=median, p10=low, p90=high, repeats=len(seconds))


def paired_ratio(seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Median over rounds of the ratio to the reference's time in the same round, with a bootstrap interval.

    Raises:
        ValueError: the two were not timed in the same rounds.
    """
    if len(seconds) != len(reference) or not seconds:
        raise ValueError(f"ratios need the same rounds of both, got {len(seconds)} and {len(reference)} of them")
    ratios = np.asarray(seconds) / np.asarray(reference)
    draws = generator("speed", "ratio").integers(len(ratios), size=(RESAMPLES, len(ratios)))
    tails = 100 * np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = np.percentile(np.median(ratios[draws], axis=1), tails)
    return Ratio(float(np.median(ratios)), float(low), float(high))
