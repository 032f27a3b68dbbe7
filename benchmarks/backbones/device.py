"""Where a run happens and how precisely it computes. torch is imported late: wrong flags are answered at once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Precision

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """The device to run on; `auto` takes the accelerator if there is one: of several, launched processes take turns."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device; leave the flag out to run on the CPU")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def resolve_precision(name: Precision, device_type: str) -> Precision:
    """`auto` takes bf16 where it is native, and fp32 where it would be emulated."""
    if name != "auto":
        return name
    import torch

    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
