"""Where and with what a record is made."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.records.schema import Provenance

ROOT = Path(__file__).resolve().parents[2]

# What a result depends on; a table written into the working tree does not make the code dirty.
_CODE = ("moepeft", "benchmarks", "pyproject.toml")
_PACKAGES = (
    "moepeft",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "tensorly",
    "datasets",
    "evaluate",
    "numpy",
    "scipy",
    "scikit-learn",
)


def gather(device: torch.device, precision: str, command: str) -> Provenance:
    """Describe code, packages and machine at the start of a cell."""
    commit, dirty = code_state()
    if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        precision = f"{precision}, fp32 products in TF32"
    return Provenance(
        commit=commit,
        dirty=dirty,
        packages=package_versions(),
        python=platform.python_version(),
        platform=platform.platform(),
        device=device_name(device),
        threads=torch.get_num_threads(),
        precision=precision,
        deterministic=device.type == "cpu" or torch.are_deterministic_algorithms_enabled(),
        started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
    )


@functools.cache
def code_state() -> tuple[str | None, bool | None]:
    """Commit, and whether the code differs from it; (None, None) outside of a git checkout.

    It is the state at the first call: what is committed while a study runs is not the code that runs.
    """
    git = shutil.which("git")
    if git is None:
        return None, None
    commit = _git(git, "rev-parse", "--verify", "HEAD")
    changes = _git(git, "status", "--porcelain", "--", *_CODE)
    return commit, None if commit is None or changes is None else bool(changes)


def _git(git: str, *arguments: str) -> str | None:
    # A `git status` that is killed with its run would leave a lock behind, and the user could commit nothing.
    done = subprocess.run(  # noqa: S603 - fixed arguments
        [git, "--no-optional-locks", "-C", str(ROOT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.stdout.strip() if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Installed versions of what the numbers depend on."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "source tree" if name == "moepeft" else "not installed"
    return versions


def device_name(device: torch.device) -> str:
    """The accelerator's or the processor's name, with the number of cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_name()}, {cores} cores"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
