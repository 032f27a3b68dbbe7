"""Which parts of the contract run in minutes: every method on every host as published, other presets on one host."""

from __future__ import annotations

import pytest

FIRST_HOST = "bert"


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        spec, host = str(params.get("spec", "")), params.get("host", FIRST_HOST)
        if "@" in spec and not spec.endswith("@published") and host != FIRST_HOST:
            item.add_marker(pytest.mark.slow)
