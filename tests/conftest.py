"""What all tests share: quiet, offline, deterministic."""

from __future__ import annotations

import gc
import itertools
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from jaxtyping import install_import_hook

from tests.support.shapes import modules_with_shapes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A job in a shell's background ignores Ctrl-C, and so would every command that a test starts to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Every annotated shape of the library is checked at every call. The hook works on what is imported after it. Slow
# tests go the same ways as fast ones, with more of everything: they leave a quarter of their time by doing without.
if os.environ.get("MOEPEFT_SHAPES", "checked") == "checked":
    install_import_hook(modules_with_shapes(), "tests.support.shapes.check")


import moepeft  # noqa: E402 - after the hook

# What runs where: see `pytest_collection_modifyitems`.
FIRST_HOST, OTHER_HOSTS = "bert", ("llama", "t5")
FIRST_METHODS = ("ept", "lora", "mixlora", "moelora", "more", "tucka")
LATER_METHODS = sorted({*moepeft.available()} - {*FIRST_METHODS})
FEW_METHODS = ("ept", "lora", "mixlora", "tucka")  # of each kind of routing one, where a case takes many seconds
SAMPLE = 8  # one architecture in so many is recomputed in CI; `make architectures` and test-exhaustive do all


def _is_beyond_the_first(item: pytest.Item) -> bool:
    """Whether a case of the library is of a later method than the first six, or of another preset than the published.

    `make test` asks of the later ones for the contract's clauses alone. Golden vectors cover the other presets.
    """
    values = getattr(getattr(item, "callspec", None), "params", {}).values() if "library/" in item.nodeid else ()
    parts = (value.partition("@") for value in values if isinstance(value, str))
    named = [(name, preset) for name, _, preset in parts if name in FIRST_METHODS or name in LATER_METHODS]
    other_preset = any(preset not in ("", "published") for _, preset in named)
    later = any(name in LATER_METHODS for name, _ in named)
    return other_preset or (later and not item.name.startswith("test_clause"))


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which tests run in `make test`, which in CI beside it, and which on demand alone (`make test-exhaustive`).

    `make test` takes three minutes: a case takes a few seconds at most, and what is asked of every method and preset is
    asked of the first six as published. The product of methods, presets, hosts and phases has thousands of cases. Every
    preset runs on one host, and each of the first six methods on one more, in turn. The rest is exhaustive.
    """
    for item in items:
        if _is_beyond_the_first(item):
            item.add_marker(pytest.mark.slow)
    _mark_exhaustive(items)


def _mark_exhaustive(items: list[pytest.Item]) -> None:
    architectures = 0
    second_host = dict(zip(FIRST_METHODS, itertools.cycle(OTHER_HOSTS), strict=False))
    for item in items:
        path, params = item.nodeid, getattr(getattr(item, "callspec", None), "params", {})
        spec, host = str(params.get("spec", "")), str(params.get("host", FIRST_HOST))
        other = ("@" in spec and not spec.endswith("@published")) or params.get("fast", True) is False
        exhaustive = False
        if "library/contract/" in path:
            named = spec.partition("@")[0]
            elsewhere = spec and host != FIRST_HOST and (other or host != second_host.get(named))
            by_definitions = params.get("fast", True) is False
            if elsewhere or (by_definitions and spec not in ("ept@published", "tucka@published")):
                item.add_marker(pytest.mark.slow)
                exhaustive = True
        elif "library/distributed/" in path:
            exhaustive = other or host != FIRST_HOST
        elif "library/device/" in path:
            label = str(params.get("label", ""))
            option = "=" in label or ("by_hand" in item.name and not label.endswith("@published"))
            exhaustive = host != FIRST_HOST or "runner" in item.name or option
        elif "library/architectures/" in path and params:
            architectures += 1
            exhaustive = architectures % SAMPLE != 1
        elif "test_compiles_" in path:
            exhaustive = str(params["words"]) not in FEW_METHODS
        elif "reliability/" in path:
            exhaustive = not any(word in path for word in ("ctrl_c", "killed", "of_the_runner", "vanishes"))
            exhaustive = exhaustive or "[outcomes]" in path
        if exhaustive:
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(autouse=True, scope="session")
def _imports_are_no_garbage() -> None:
    """What was imported and collected is never freed: each full collection would walk it again, a third of a second."""
    gc.collect()
    gc.freeze()


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
