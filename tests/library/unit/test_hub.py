"""Adapters of the hub: read by id and revision, sent with a card. The hub itself is not asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moepeft
from moepeft.bridges.peft_checkpoints import export_lora
from moepeft.errors import AdapterFileError, Unsupported
from tests.support.hosts import batch, build, output

huggingface_hub = pytest.importorskip("huggingface_hub")


class Hub:
    """Keeps what it is sent, and gives it back."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.made = folder, [], []

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repo_id, revision))
        if repo_id != "some/adapters":
            raise huggingface_hub.errors.EntryNotFoundError("none there")
        return str(self.folder)

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.made.append((repo_id, private))

    def upload_folder(self, *, repo_id: str, folder_path: str, **_: Any) -> str:
        for path in Path(folder_path).iterdir():
            (self.folder / path.name).write_bytes(path.read_bytes())
        return f"hub:{repo_id}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "hub")
    fake.folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    return fake


def test_sent_to_the_hub_and_loaded_from_it(hub: Hub) -> None:
    model = build("bert")
    model.config._name_or_path = "some/base"
    adapters = moepeft.attach(model, moepeft.method("ept", num_tasks=2), train=["embeddings.LayerNorm"])
    for parameter in adapters.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    scores = {"boolq": {"metrics": {"accuracy": 0.6551}, "rows": 400}, "sst2": {"metrics": {"mcc": None}, "rows": 7}}
    address = adapters.push_to_hub("some/adapters", tasks=["boolq", "sst2"], record={"scores": scores}, private=True)
    assert (address, hub.made) == ("hub:some/adapters", [("some/adapters", True)])
    card = (hub.folder / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert head.splitlines() == ["library_name: moepeft", "tags: [moepeft, ept]", "base_model: some/base"]
    for fact in ("arxiv.org/abs/2603.12577", "| num_tasks | 2 |", "0. boolq", "1. sst2", "0.6551", "| mcc | undefined"):
        assert fact in body, fact
    assert "embeddings.LayerNorm" in body

    again = build("bert")
    moepeft.load(again, "some/adapters@v1.0")
    assert hub.asked == [("some/adapters", "v1.0")]
    inputs = batch(model)
    assert torch.equal(output(again, inputs, task_ids=[0, 1, 1, 0]), output(model, inputs, task_ids=[0, 1, 1, 0]))
    with pytest.raises(AdapterFileError, match="EntryNotFoundError"):
        moepeft.load(build("bert"), "some/others")


def test_a_card_names_no_path_of_this_machine(hub: Hub, tmp_path: Path) -> None:
    for place in (tmp_path / "base", Path("some/base")):
        place.mkdir(parents=True)
        model = build("bert")
        model.config._name_or_path = str(place)
        moepeft.attach(model, moepeft.method("lora")).push_to_hub("some/adapters")
        assert str(place) not in (hub.folder / "README.md").read_text()


def test_every_folder_that_the_library_writes_is_read(hub: Hub, tmp_path: Path) -> None:
    """A save, an export, and a folder of checkpoints, which is none itself."""
    pytest.importorskip("peft")
    adapters = moepeft.attach(build("llama"), moepeft.method("moelora", num_tasks=2))
    for parameter in adapters.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    inputs = batch(adapters.model)
    expected = output(adapters.model, inputs, task_ids=[1] * 4)
    export_lora(adapters, tmp_path / "export", task=1)
    served = build("llama")
    assert moepeft.load(served, tmp_path / "export").factory.name == "lora"
    assert torch.allclose(output(served, inputs), expected, atol=1e-5)
    adapters.save(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(AdapterFileError, match="checkpoint-2"):
        moepeft.load(build("llama"), tmp_path / "run")
    ept = moepeft.attach(build("llama"), moepeft.method("ept", num_tasks=2))
    for parameter in ept.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    export_lora(ept, tmp_path / "ranks", task=0)
    with pytest.raises(Unsupported, match="of one rank"):
        moepeft.load(build("llama"), tmp_path / "ranks")
