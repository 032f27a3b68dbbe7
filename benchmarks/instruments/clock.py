"""Time contestants in turns, A B C A B C, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import bootstrap

from benchmarks.instruments.processor import keep_free_memory, synchronise
from benchmarks.protocols.seeds import generator
from benchmarks.records.schema import Quantiles

RESAMPLES = 2000
CONFIDENCE = 0.95
CUDA_BURST = 5
"""Steps that one turn on a GPU covers: the host runs ahead of the device, as in training, and one wait is shared."""


@dataclass(frozen=True, slots=True)
class Step:
    """What is timed.

    Attributes:
        label: names it.
        run: the work; a turn may run it several times.
        prepare: what must happen before each turn and is not timed.
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
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    failures: dict[str, Exception] = {}
    keep_free_memory(device)
    with collecting_between_rounds():
        for number in range(warmup + repeats):
            gc.collect()  # what a round leaves behind is not collected within a later step
            first = number % len(steps) if steps else 0  # the first of a round finds colder caches: not always the same
            for step in (*steps[first:], *steps[:first]):
                if step.label in failures:
                    continue
                outcome = _take_turn(step, device, settle)
                if isinstance(outcome, Exception):
                    failures[step.label] = outcome
                elif number >= warmup:
                    seconds[step.label].append(outcome)
    return Timings({label: seconds[label] for label in labels if label not in failures}, failures)


def _take_turn(step: Step, device: torch.device, settle: int) -> float | Exception:
    """Seconds per step; the error if there is one: a contestant that fails becomes a row that says why."""
    runs = CUDA_BURST if device.type == "cuda" else 1
    try:
        with step.around():
            for _ in range(settle):
                step.prepare()
                step.run()
            step.prepare()
            synchronise(device)  # what others have queued is theirs
            begun = time.perf_counter()
            for _ in range(runs):
                step.run()
            synchronise(device)
            return (time.perf_counter() - begun) / runs
    except Exception as error:
        return error


@contextmanager
def collecting_between_rounds() -> Iterator[None]:
    """Inside, garbage is collected when asked for only, and what was there before is not looked through again."""
    enabled, frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.collect()
    if not frozen:  # what the caller froze stays frozen: there is one pool of frozen objects
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not frozen:
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
    estimate = float(np.median(ratios))
    if len(ratios) == 1:
        return Ratio(estimate, estimate, estimate)
    found = bootstrap(
        (ratios,),
        np.median,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=generator("speed", "ratio"),
    )
    return Ratio(estimate, float(found.confidence_interval.low), float(found.confidence_interval.high))
