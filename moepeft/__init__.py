"""MoE-LoRA adapters behind one protocol: attach, train, route, merge, save, load."""

import importlib
from typing import TYPE_CHECKING, Any

from .attach import Attachment, attach, attachment, attachments
from .config import MethodConfig
from .errors import MoepeftError
from .fast import fast_paths
from .loading import load
from .protocols import Adapter, AdapterFactory, Capabilities
from .registry import available, method
from .sites import LinearSite, find_sites

if TYPE_CHECKING:
    from .methods.ept import EPT
    from .methods.lora import LoRA
    from .methods.mixlora import MixLoRA
    from .methods.moelora import MOELoRA
    from .methods.more import MoRE
    from .methods.tucka import TuckA

__all__ = [
    "EPT",
    "Adapter",
    "AdapterFactory",
    "Attachment",
    "Capabilities",
    "LinearSite",
    "LoRA",
    "MOELoRA",
    "MethodConfig",
    "MixLoRA",
    "MoRE",
    "MoepeftError",
    "TuckA",
    "attach",
    "attachment",
    "attachments",
    "available",
    "fast_paths",
    "find_sites",
    "load",
    "method",
]

# Imported when first asked for: a method may need a package of its own.
_METHODS = {name: name.lower() for name in ("EPT", "LoRA", "MOELoRA", "MixLoRA", "MoRE", "TuckA")}


def __getattr__(name: str) -> Any:
    if name not in _METHODS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".methods.{_METHODS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
