"""Which cases a session asks for: what is computed once for many tests is computed for these alone."""

from __future__ import annotations

from typing import Any

import pytest


def asked(request: pytest.FixtureRequest, *names: str) -> list[tuple[Any, ...]]:
    """The values of the parameters `names` over the selected tests of the requesting test's file, each once."""
    found: dict[tuple[Any, ...], None] = {}
    for item in request.session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if item.path == request.node.path and all(name in params for name in names):
            found[tuple(params[name] for name in names)] = None
    return list(found)
