"""The device and the processor: waiting for the one, and who had the other."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch

# Processor times are counted in hundredths of a second: a shorter span says nothing.
SHORTEST_SPAN = 0.5


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare_device(device: torch.device) -> None:
    """Make a GPU this process's own, and let it multiply fp32 matrices in TF32."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of several, a launched process would allocate on the first one otherwise
        torch.set_float32_matmul_precision("high")


def keep_free_memory(device: torch.device) -> None:
    """From now on this process keeps the processor's memory that it frees, as torch does with a GPU's.

    Without this, a large tensor costs page faults or none, depending on what was freed before it. The faults are some
    per cent of a training step, and their number differs between two contestants of one process.
    """
    if device.type == "cpu":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
        if set_option is not None:
            trim_threshold, mmap_max = -1, -4
            set_option(trim_threshold, 2**31 - 1)
            set_option(mmap_max, 0)


@dataclass(frozen=True, slots=True)
class ProcessorTimes:
    """The processor's counters at one moment.

    Attributes:
        wall: seconds of a clock.
        own: processor seconds of this process.
        busy: seconds that the cores of this process were not idle; None where the system does not tell.
        cores: how many those are.
        threads: torch's.
    """

    wall: float
    own: float
    busy: float | None
    cores: int
    threads: int


def read_processor() -> ProcessorTimes:
    """The counters now."""
    cores = _own_cores()
    busy = None if cores is None else sum(map(_busy, cores))
    return ProcessorTimes(
        time.perf_counter(), time.process_time(), busy, 0 if cores is None else len(cores), torch.get_num_threads()
    )


def processor_shares(before: ProcessorTimes, after: ProcessorTimes) -> tuple[float | None, float | None]:
    """How much of its threads' time this process ran, and how much of its cores others took; None where not known.

    Time that another guest of the same host took from a virtual machine counts as the others'.

    Returns:
        own share of wall time x threads, others' share of wall time x cores.
    """
    wall, own = after.wall - before.wall, after.own - before.own
    if wall < SHORTEST_SPAN:
        return None, None
    others = None
    if before.busy is not None and after.busy is not None:
        others = round(min(1.0, max(0.0, (after.busy - before.busy - own) / (wall * after.cores))), 4)
    return round(own / (wall * after.threads), 4), others


def _own_cores() -> list[Any] | None:
    process, every = psutil.Process(), psutil.cpu_times(percpu=True)
    if not hasattr(process, "cpu_affinity"):  # macOS
        return None
    own = process.cpu_affinity()
    return [every[core] for core in own] if max(own) < len(every) else None


def _busy(core: Any) -> float:
    # A guest's time is counted in user; waiting for a disk is idleness.
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    return float(sum(getattr(core, name, 0.0) for name in names))
