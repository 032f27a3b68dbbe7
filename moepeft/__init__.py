"""MoE-LoRA adapters behind one protocol: attach, train, route, merge, save, load."""

from .attach import Attachment, attach, attachment
from .errors import MoepeftError
from .fast import fast_paths
from .protocols import Adapter, AdapterFactory, Capabilities, LinearSite
from .registry import available, method
from .saving import load
from .sites import find_sites

__all__ = [
    "Adapter",
    "AdapterFactory",
    "Attachment",
    "Capabilities",
    "LinearSite",
    "MoepeftError",
    "attach",
    "attachment",
    "available",
    "fast_paths",
    "find_sites",
    "load",
    "method",
]
