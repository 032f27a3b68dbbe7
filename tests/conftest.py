"""What all tests share: quiet, offline, deterministic."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from jaxtyping import install_import_hook

import tests.support.shapes  # noqa: F401 - the hook finds it by name, and only if it is there

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A job in a shell's background ignores Ctrl-C, and so would every command that a test starts to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Every annotated shape of the library is checked at every call. The hook works on what is imported after it.
install_import_hook("moepeft", "tests.support.shapes.check")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose a lot where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
