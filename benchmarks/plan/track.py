"""The track of a suite: methods as published, or all of one size."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.backbones.load import BackboneSource, backbone_sites
from benchmarks.methods.base import Method
from benchmarks.methods.parse import parse_method
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Suite


def apply_track(suite: Suite, methods: Mapping[str, Method], source: BackboneSource) -> tuple[Suite, dict[str, Method]]:
    """Bring all methods to one size where the track asks for it.

    Returns:
        The suite with the target in numbers, and the methods, each at its nearest size.

    Raises:
        UsageError: there is no reference to match.
    """
    if suite.track != "matched":
        return suite, dict(methods)
    sites = backbone_sites(source, suite.family)
    target = suite.target_parameters
    if target is None:
        assert suite.reference is not None
        target = parse_method(suite.reference, len(suite.tasks)).count(sites)
    if target is None:
        raise UsageError(f"the size of {suite.reference} is known in no closed form; give --target-parameters")
    matched = {name: method.size_for(target, sites) for name, method in methods.items()}
    return suite.with_overrides(target_parameters=target), matched
