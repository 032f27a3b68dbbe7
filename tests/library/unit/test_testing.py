"""`moepeft.testing.check_method` on hosts that a method refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest

from moepeft.errors import ContractError, Unsupported
from moepeft.methods.lora import LoRA
from moepeft.protocols import LinearSite
from moepeft.testing import HOSTS, check_method


@dataclass(frozen=True, kw_only=True)
class Picky(LoRA):
    """LoRA for models with a certain layer."""

    name: ClassVar[str] = "picky"
    layer: str = "gate_proj"

    def select(self, sites: Sequence[LinearSite]) -> Sequence[LinearSite]:
        if not any(site.name.endswith(self.layer) for site in sites):
            raise Unsupported(f"Picky needs a layer {self.layer}")
        return sites


def test_a_refused_host_is_left_out_and_said() -> None:
    refused, checked, _ = HOSTS
    with pytest.warns(UserWarning, match=f"picky was not checked on {refused.name}: Picky needs a layer gate_proj"):
        check_method(Picky(), [refused, checked])


def test_a_method_that_refuses_every_host_was_not_checked() -> None:
    with pytest.raises(ContractError, match=r"refuses every host, so nothing was checked: .*Picky needs a layer none"):
        check_method(Picky(layer="none"))
