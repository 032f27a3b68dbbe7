"""Saved adapters: what is refused, with one clear line, the model left as it was."""

from __future__ import annotations

import copy
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import moepeft
from moepeft.errors import AdapterFileError
from tests.support.hosts import batch, build, output


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


def first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Change the first floating-point tensor."""

    def changed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(name for name, value in state.items() if value.is_floating_point())
        return {**state, name: change(state[name])}

    return weights(changed)


def in_place_of(name: str, put: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else than a file stands there."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder / "elsewhere")
        put(folder / name)

    return damage


def without(key: str) -> Callable[[dict[str, object]], dict[str, object]]:
    return lambda old: {name: value for name, value in old.items() if name != key}


def described(change: Callable[[dict[str, object]], dict[str, object]]) -> Callable[[Path], None]:
    return rewrite("adapter.json", lambda b: json.dumps(change(json.loads(b))).encode())


DAMAGE = {
    "no folder": (lambda folder: [f.unlink() for f in folder.iterdir()], "does not exist"),
    "no weights": (lambda folder: (folder / "adapter.safetensors").unlink(), "the folder is incomplete"),
    "truncated weights": (rewrite("adapter.safetensors", lambda b: b[: len(b) // 2]), "not a whole safetensors file"),
    "truncated description": (rewrite("adapter.json", lambda b: b[: len(b) // 2]), "not readable JSON"),
    "a pickle": (rewrite("adapter.safetensors", lambda b: pickle.dumps({"a": 1})), "not a whole safetensors file"),
    "a huge header": (rewrite("adapter.safetensors", lambda b: b"\xff" * 8 + b[8:]), "not a whole safetensors file"),
    "binary description": (rewrite("adapter.json", lambda b: b"\xff\xfe\x00"), "not readable JSON"),
    "newer schema": (edit("schema_version", 99), "schema version 99, this moepeft reads version 2"),
    "a list": (rewrite("adapter.json", lambda b: b"[]"), "holds a list, wanted a JSON object"),
    "a number": (rewrite("adapter.json", lambda b: b"7"), "holds a int, wanted a JSON object"),
    "no schema": (described(without("schema_version")), "schema version None"),
    "true for a schema": (edit("schema_version", True), "schema version True"),
    "a key too few": (described(without("base")), "must hold exactly"),
    "a key too many": (edit("__class__", "os.system"), "must hold exactly"),
    "a key twice": (rewrite("adapter.json", lambda b: b'{"method": "lora",' + b[1:]), "a key stands twice"),
    "deep nesting": (rewrite("adapter.json", lambda b: b"[" * 10**6), "not readable JSON"),
    "endless digits": (rewrite("adapter.json", lambda b: b"1" * 10**5), "not readable JSON"),
    "too long": (in_place_of("adapter.json", lambda p: (p.touch(), os.truncate(p, 2**40))), "wanted at most"),
    "a pipe": (in_place_of("adapter.json", os.mkfifo), "not a regular file"),
    "a pipe for weights": (in_place_of("adapter.safetensors", os.mkfifo), "not a regular file"),
    "a link to a device": (in_place_of("adapter.json", lambda p: p.symlink_to("/dev/zero")), "not a regular file"),
    "a link to itself": (in_place_of("adapter.json", lambda p: p.symlink_to(p)), "does not exist"),
    "a folder": (in_place_of("adapter.safetensors", Path.mkdir), "not a regular file"),
    "a header of 99 MB": (
        rewrite("adapter.safetensors", lambda b: (99_000_000).to_bytes(8, "little") + b[8:]),
        "not a whole safetensors file",
    ),
    "unknown method": (edit("method", "eptt"), "Did you mean ept"),
    "unknown field": (edit("config", lambda c: {**c, "ranks": 3}), "no hyper-parameter 'ranks'"),
    "bad field": (edit("config", lambda c: {**c, "rank": "8; rm"}), "rank='8; rm'"),
    "a field too few": (edit("config", without("rank")), r"lacks \['rank'\]"),
    "a field without end": (edit("config", lambda c: {**c, "routing": "task\n\x1b[2J" * 10**5}), "wanted one of"),
    "not finite in the configuration": (edit("config", lambda c: {**c, "alpha": float("inf")}), "not a finite number"),
    "no name of a method": (edit("method", ["ept"]), "cannot be made from its configuration"),
    "a path for a method": (edit("method", "../../evil:Class"), "there is no method"),
    "a rank without end": (edit("config", lambda c: {**c, "rank": 10**15}), "should have shape|cannot be made for"),
    "a rank beyond integers": (edit("config", lambda c: {**c, "rank": 10**30}), "cannot be made for this model"),
    "another class": (edit("base", lambda b: {**b, "class": "GPT2Model"}), "made for a GPT2Model, got a BertModel"),
    "damaged samples": (
        edit("base", lambda b: {**b, "samples": {"pooler": 7}}),
        "other weights|description of the base",
    ),
    "samples of no type": (
        edit("base", lambda b: {**b, "samples": {k: {**v, "dtype": "loads"} for k, v in b["samples"].items()}}),
        "description of the base",
    ),
    "another site": (edit("sites", lambda s: [{**s[0], "name": "../../etc"}, *s[1:]]), "no such layer"),
    "another width": (edit("sites", lambda s: [{**s[0], "in_features": 7}, *s[1:]]), "shape 7 -> 32"),
    "sites missing": (edit("sites", "none"), "list of sites is damaged"),
    "sites empty": (edit("sites", {}), "list of sites is damaged"),
    "a site twice": (edit("sites", lambda s: [s[0], *s]), "a site stands twice"),
    "a site of another order": (edit("sites", lambda s: s[::-1]), "list of sites is damaged"),
    "a site without a name": (edit("sites", lambda s: [{**s[0], "name": ["q"]}, *s[1:]]), "list of sites is damaged"),
    "a site too few": (edit("sites", lambda s: s[1:]), "should have shape"),
    "another rank": (edit("config", lambda c: {**c, "rank": 4}), "should have shape"),
    "missing tensor": (weights(lambda s: dict(list(s.items())[1:])), "should have shape"),
    "wrong shape": (weights(lambda s: {k: v.flatten() for k, v in s.items()}), "should have shape"),
    "an extra tensor": (weights(lambda s: {**s, "../../evil": torch.ones(1)}), "should have shape None"),
    "not a number": (first(lambda v: v.index_fill(-1, torch.tensor(0), float("nan"))), "not finite"),
    "infinite": (first(lambda v: v / 0), "not finite"),
    "infinite where it goes": (first(lambda v: v.double() + 1e300), "not finite"),
    "integers": (first(lambda v: v.long()), "torch.int64, wanted torch.float32"),
    "complex": (first(lambda v: v * complex(1, float("nan"))), "torch.complex64, wanted torch.float32"),
    "eight bits": (first(lambda v: v.to(torch.float8_e4m3fn)), "torch.float8_e4m3fn, wanted torch.float32"),
}


def traces(model: nn.Module) -> dict[str, object]:
    """Everything that loading must leave alone, but for the values."""
    return {
        "keys": list(model.state_dict()),
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": [
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called)
        ],
    }


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders_are_refused_and_the_model_is_untouched(name: str, saved: Path) -> None:
    damage, message = DAMAGE[name]
    damage(saved)
    model = build("bert")
    model.get_submodule("encoder.layer.0").requires_grad_(False)
    before, values, expected = traces(model), copy.deepcopy(model.state_dict()), output(model, batch(model))
    start = time.perf_counter()
    with pytest.raises(AdapterFileError, match=message) as caught:
        moepeft.load(model, saved)
    assert time.perf_counter() - start < 5
    assert str(caught.value).isprintable()  # which newlines are not
    assert len(str(caught.value)) < 1000
    assert traces(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert torch.equal(output(model, batch(model)), expected)
    own = moepeft.attach(model, moepeft.method("ept", num_tasks=3))  # and it can take adapters as if nothing was
    kept = copy.deepcopy(own.state_dict())
    with pytest.raises(AdapterFileError):
        own.restore(saved)
    assert all(torch.equal(value, kept[key]) for key, value in own.state_dict().items())


def test_files_of_the_hubs_cache_are_links(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    snapshot = tmp_path_factory.mktemp("snapshot")
    for path in saved.iterdir():
        (snapshot / path.name).symlink_to(path)
    moepeft.load(build("bert"), snapshot)


def test_values_of_other_precisions_are_taken(saved: Path) -> None:
    first(lambda v: v.bfloat16())(saved)
    moepeft.load(build("bert"), saved)


def test_a_field_that_a_former_version_did_not_have_is_its_default(saved: Path) -> None:
    edit("config", without("anchor"))(saved)
    edit("moepeft_version", "0.0.1")(saved)
    assert moepeft.load(build("bert"), saved).factory == moepeft.method("ept", num_tasks=3)


def test_another_architecture_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterFileError, match="made for a BertModel, got a LlamaForCausalLM"):
        moepeft.load(build("llama"), saved)


@pytest.mark.parametrize("saved_in", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded_in", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_base_is_known_by_its_weights_in_any_precision(
    saved_in: torch.dtype, loaded_in: torch.dtype, tmp_path: Path
) -> None:
    """Not by its path; another base of the same class is refused, however close."""
    model = build("bert").to(saved_in)
    model.config._name_or_path = "/home/someone/base"
    adapters = moepeft.attach(model, moepeft.method("lora"))
    adapters.save(tmp_path)
    other = build("bert").to(loaded_in)
    other.config._name_or_path = "./base/"
    moepeft.load(other, tmp_path).detach()
    close = build("bert")
    for parameter in close.encoder.layer[1].parameters():
        parameter.data.mul_(1.02)
    tuned = close.to(loaded_in)
    with pytest.raises(AdapterFileError, match=r"encoder\.layer\.1.*any_base=True"):
        moepeft.load(tuned, tmp_path)
    moepeft.load(tuned, tmp_path, any_base=True)
    adapters.merge()
    adapters.save(tmp_path)  # the base is what it was before
    moepeft.load(other, tmp_path)


def test_nothing_but_safetensors_and_json(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["adapter.json", "adapter.safetensors"]
    description = json.loads((saved / "adapter.json").read_text())
    assert description["schema_version"] == 2
    assert description["config"]["kernels"] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert {"name", "in_features", "out_features"} == set(description["sites"][0])


def test_saving_again_replaces_whole_files(saved: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    adapters = moepeft.attach(model, moepeft.method("lora", rank=2))
    adapters.save(saved)
    moepeft.load(adapters.detach(), saved)


def test_saving_follows_no_link_and_leaves_no_scraps(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    victim = tmp_path_factory.mktemp("home") / "victim"
    victim.write_text("precious")
    for name in ("adapter.json", "adapter.safetensors"):
        (saved / name).unlink()
        for link in (name, f"{name}.tmp"):
            (saved / link).symlink_to(victim)
    moepeft.attach(build("bert"), moepeft.method("lora")).save(saved)
    assert victim.read_text() == "precious"
    assert not (saved / "adapter.json").is_symlink()
    assert {path.name for path in saved.iterdir() if not path.is_symlink()} == {"adapter.json", "adapter.safetensors"}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_save_that_fails_leaves_what_there_was(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the two files, new weights must not go with an old description of the same shapes."""
    model = build("bert")
    other = moepeft.attach(model, moepeft.method("ept", num_tasks=3, alpha=99.0))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    before = files(saved)
    for parameter in other.parameters():
        parameter.data.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr("moepeft.files.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            other.save(saved)
    assert files(saved) == before
    with monkeypatch.context() as patch:
        real = Path.replace
        patch.setattr(Path, "replace", lambda p, to: full() if to.suffix == ".json" else real(p, to))
        with pytest.raises(OSError, match="No space left"):
            other.save(saved)
    assert files(saved)["adapter.safetensors"] != before["adapter.safetensors"]
    with pytest.raises(AdapterFileError, match=r"adapter.json does not exist"):
        moepeft.load(build("bert"), saved)


def test_only_some_sites(tmp_path: Path) -> None:
    model = build("t5")
    chosen = moepeft.attach(model, moepeft.method("tucka"), sites=["q", "v"])
    output(model, batch(model))
    chosen.save(tmp_path)
    again = moepeft.load(build("t5"), tmp_path)
    assert again.sites == chosen.sites


class Classifier(nn.Module):
    """A backbone with a new head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).relu())


@pytest.mark.parametrize("spec", ["lora", "ept", "tucka"])
def test_what_was_unfrozen_and_trained_is_saved_loaded_and_restored_as_well(spec: str, tmp_path: Path) -> None:
    model, x, ids = Classifier(), torch.randn(2, 4, 8), [0, 1]
    adapters = moepeft.attach(model, moepeft.method(spec, num_tasks=2), sites=["layer"])
    model.head.requires_grad_(True)
    with torch.no_grad():
        for parameter in (*adapters.parameters(), *model.head.parameters()):
            parameter.add_(torch.randn_like(parameter))
    expected = model.eval()(x, task_ids=ids)
    adapters.save(tmp_path)

    again = Classifier().eval()
    moepeft.load(again, tmp_path)
    assert torch.allclose(again(x, task_ids=ids), expected)
    assert again.head.weight.requires_grad
    with torch.no_grad():
        again.head.weight.zero_()
    moepeft.attachment(again).restore(tmp_path)
    assert torch.allclose(again(x, task_ids=ids), expected)

    frozen = Classifier()
    other = moepeft.attach(frozen, moepeft.method(spec, num_tasks=2), sites=["layer"])
    with pytest.raises(AdapterFileError, match=r"head\.weight"):
        other.restore(tmp_path)
    other.save(tmp_path)
    assert not (tmp_path / "trained.safetensors").exists()
