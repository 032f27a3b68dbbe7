"""Saved adapters: what is refused, with one clear line, the model left as it was."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import moepeft
from moepeft.errors import AdapterFileError
from tests.hosts import batch, build, output


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build("bert")
    adapters = moepeft.attach(model, moepeft.method("ept", num_tasks=3))
    adapters.save(tmp_path)
    return tmp_path


def edit(key: str, value: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        description = json.loads((folder / "adapter.json").read_text())
        description[key] = value(description[key]) if callable(value) else value
        (folder / "adapter.json").write_text(json.dumps(description))

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda folder: save_file(change(load_file(folder / "adapter.safetensors")), folder / "adapter.safetensors")


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def poison(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    next(iter(state.values())).view(-1)[0] = float("nan")
    return state


DAMAGE = {
    "no folder": (lambda folder: [f.unlink() for f in folder.iterdir()], "does not exist"),
    "no weights": (lambda folder: (folder / "adapter.safetensors").unlink(), "the folder is incomplete"),
    "truncated weights": (rewrite("adapter.safetensors", lambda b: b[: len(b) // 2]), "not a whole safetensors file"),
    "truncated description": (rewrite("adapter.json", lambda b: b[: len(b) // 2]), "not readable JSON"),
    "a pickle": (rewrite("adapter.safetensors", lambda b: pickle.dumps({"a": 1})), "not a whole safetensors file"),
    "a huge header": (rewrite("adapter.safetensors", lambda b: b"\xff" * 8 + b[8:]), "not a whole safetensors file"),
    "binary description": (rewrite("adapter.json", lambda b: b"\xff\xfe\x00"), "not readable JSON"),
    "newer schema": (edit("schema_version", 2), "schema version 2, this moepeft reads version 1"),
    "a list": (rewrite("adapter.json", lambda b: b"[]"), "schema version None"),
    "unknown method": (edit("method", "eptt"), "Did you mean ept"),
    "unknown field": (edit("config", lambda c: {**c, "ranks": 3}), "no hyper-parameter 'ranks'"),
    "bad field": (edit("config", lambda c: {**c, "rank": "8; rm"}), "rank='8; rm'"),
    "another class": (edit("base", lambda b: {**b, "class": "GPT2Model"}), "made for a GPT2Model, got a BertModel"),
    "another site": (edit("sites", lambda s: [{**s[0], "name": "../../etc"}, *s[1:]]), "no such layer"),
    "another width": (edit("sites", lambda s: [{**s[0], "in_features": 7}, *s[1:]]), "shape 7 -> 32"),
    "sites missing": (edit("sites", "none"), "list of sites is damaged"),
    "another rank": (edit("config", lambda c: {**c, "rank": 4}), "should have shape"),
    "missing tensor": (weights(lambda s: dict(list(s.items())[1:])), "should have shape"),
    "wrong shape": (weights(lambda s: {k: v.flatten() for k, v in s.items()}), "should have shape"),
    "not finite": (weights(poison), "not finite"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders_are_refused_and_the_model_is_untouched(name: str, saved: Path) -> None:
    damage, message = DAMAGE[name]
    damage(saved)
    model = build("bert")
    keys, expected = list(model.state_dict()), output(model, batch(model))
    with pytest.raises(AdapterFileError, match=message) as caught:
        moepeft.load(model, saved)
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == keys
    assert torch.equal(output(model, batch(model)), expected)
    assert all(p.requires_grad for p in model.parameters())
    moepeft.attach(model, moepeft.method("lora"))  # and it can take adapters as if nothing had happened


def test_another_architecture_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterFileError, match="made for a BertModel, got a LlamaForCausalLM"):
        moepeft.load(build("llama"), saved)


def test_another_base_is_refused_unless_told(tmp_path: Path) -> None:
    model = build("bert")
    model.config._name_or_path = "someone/base"
    moepeft.attach(model, moepeft.method("lora")).save(tmp_path)
    other = build("bert")
    other.config._name_or_path = "someone/else"
    with pytest.raises(AdapterFileError, match=r"'someone/base', got 'someone/else'.*any_base=True"):
        moepeft.load(other, tmp_path)
    moepeft.load(other, tmp_path, any_base=True)


def test_nothing_but_safetensors_and_json(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["adapter.json", "adapter.safetensors"]
    description = json.loads((saved / "adapter.json").read_text())
    assert description["schema_version"] == 1
    assert description["config"]["kernels"] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert {"name", "in_features", "out_features"} == set(description["sites"][0])


def test_saving_again_replaces_whole_files(saved: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    moepeft.attach(model, moepeft.method("lora", rank=2)).save(saved)
    moepeft.load(nn.Sequential(nn.Linear(4, 4)), saved)


def test_only_some_sites(tmp_path: Path) -> None:
    model = build("t5")
    chosen = moepeft.attach(model, moepeft.method("tucka"), sites=["q", "v"])
    output(model, batch(model))
    chosen.save(tmp_path)
    again = moepeft.load(build("t5"), tmp_path)
    assert again.sites == chosen.sites
