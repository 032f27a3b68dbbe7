"""Several trained adapters of one model: one after the other, and side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moepeft
from moepeft.errors import AdapterFileError, NotMergeable
from tests.support.hosts import batch, build, output

IDS = torch.tensor([0, 1, 1, 0])


def moved(adapters: moepeft.Attachment, seed: int) -> moepeft.Attachment:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapters


# ---------------------------------------------------------------------- one after the other


@pytest.mark.parametrize("spec", ["lora", "more@released", "ept"])
def test_switch_replaces_values_in_place(spec: str, tmp_path: Path) -> None:
    model = build("bert")
    inputs, expected = batch(model), {}
    by_task = spec != "lora"
    for seed, name in enumerate("ab"):
        adapters = moved(moepeft.attach(model, moepeft.method(spec, num_tasks=2)), seed)
        expected[name] = output(model, inputs, task_ids=IDS)
        adapters.save(tmp_path / name)
        adapters.detach()
    adapters = moepeft.load(model, tmp_path / "a")
    parameters = [*adapters.parameters()]
    for name in "bab":
        adapters.switch(tmp_path / name)
        assert torch.equal(output(model, inputs, task_ids=IDS), expected[name])
    assert all(one is other for one, other in zip(parameters, adapters.parameters(), strict=True))

    adapters.merge(**({"task": 1} if by_task else {}))
    with pytest.raises(NotMergeable, match="switch"):
        adapters.restore(tmp_path / "a")
    adapters.switch(tmp_path / "a")
    merged = output(model, inputs)
    torch.testing.assert_close(merged[1], expected["a"][1], rtol=1e-4, atol=1e-5)
    other = moepeft.attach(build("bert"), moepeft.method(spec, num_tasks=2, rank=3))
    other.save(tmp_path / "c")
    with pytest.raises(AdapterFileError, match="another config"):
        adapters.switch(tmp_path / "c")
    assert torch.equal(output(model, inputs), merged)
    adapters.unmerge()
    assert torch.equal(output(model, inputs, task_ids=IDS), expected["a"])
