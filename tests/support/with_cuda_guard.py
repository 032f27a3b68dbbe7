"""Run a module in a torch that believes in a CUDA device: ``python -m tests.support.with_cuda_guard MODULE WORDS``.

The guard of `cuda_guard.cpp` is loaded before torch is imported, which asks only once whether there is CUDA. g++ is
needed; no GPU and no CUDA are.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda_guard.cpp")


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build_guard() -> Path:
    """The guard's library, built once for each torch and source."""
    torch = torch_folder()
    key = hashlib.sha256(SOURCE.read_bytes() + (torch / "version.py").read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"cuda-guard-{os.getuid()}-{key}"
    library = folder / "guard.so"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        made = folder / f"{os.getpid()}.so"
        options = ("-std=c++20", "-O0", "-fPIC", "-shared", f"-I{torch / 'include'}", f"-L{torch / 'lib'}")
        subprocess.run(["g++", *options, str(SOURCE), "-o", str(made), "-lc10", "-ltorch_cpu"], check=True)
        made.rename(library)
    return library


def main(module: str, *words: str) -> None:
    assert "torch" not in sys.modules
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(build_guard()))
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
