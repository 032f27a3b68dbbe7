"""A trained model leaves the library: as a plain model, and as a LoRA of the `peft` package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig

import moepeft
from moepeft.bridges.peft_checkpoints import export_lora
from moepeft.errors import ConfigError, MissingRouting, NotMergeable
from tests.support.hosts import HOSTS, batch, build, output

METHODS = ["lora", "moelora", "more", "ept"]
READER = """
import sys
sys.modules["moepeft"] = None  # an import of it raises
import torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoConfig
import transformers

for folder in sorted(Path(sys.argv[1]).iterdir()):
    kind = getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    missing = {name for name in info.pop("missing_keys") if not name.startswith("pooler.")}  # the host was made without
    assert not missing and not any(info.values()), (folder, missing, info)
    tensors = load_file(folder / "case.safetensors")
    expected = tensors.pop("expected")
    with torch.no_grad():
        result = model.eval()(**tensors)
    found = result.logits if hasattr(result, "logits") else result.last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5), (folder, (found - expected).abs().max())
    print(folder.name)
"""


def adapted(spec: str, host: str, seed: int = 3, **fields: Any) -> tuple[moepeft.Attachment, int | None]:
    adapters = moepeft.attach(build(host), moepeft.method(spec, num_tasks=3, **fields))
    torch.manual_seed(seed)
    for parameter in adapters.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return adapters, 1 if adapters.factory.capabilities.routing == "task" else None


@torch.no_grad()
def routed(adapters: moepeft.Attachment, inputs: dict[str, Tensor], task: int | None) -> Tensor:
    return output(adapters.model, inputs, **({} if task is None else {"task_ids": [task] * 4}))


@pytest.mark.slow
def test_a_merged_model_is_read_by_transformers_alone(tmp_path: Path) -> None:
    """In a process where this library cannot be imported; the checkpoint has the base's keys and no other."""
    for host in HOSTS:
        build(host).save_pretrained(tmp_path / "bases" / host)
        for spec in METHODS:
            adapters, task = adapted(spec, host)
            inputs = batch(adapters.model)
            expected = routed(adapters, inputs, task)
            folder = tmp_path / "merged" / f"{host}-{spec}"
            adapters.merge_and_detach(task=task).save_pretrained(folder)
            assert (
                load_file(folder / "model.safetensors").keys()
                == load_file(tmp_path / "bases" / host / "model.safetensors").keys()
            )
            save_file({**inputs, "expected": expected.contiguous()}, folder / "case.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "merged")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(HOSTS) * len(METHODS)


@pytest.mark.parametrize("spec", METHODS)
def test_an_export_of_rank_16_loses_what_it_says(spec: str, tmp_path: Path) -> None:
    """Measured on the update that peft makes of the checkpoint."""
    peft = pytest.importorskip("peft")
    adapters, task = adapted(spec, "bert")
    export = export_lora(adapters, tmp_path, task=task, rank=16)
    loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path)
    for site in adapters.sites:
        update = adapters.adapters[site.name].delta_weight(task).detach()  # type: ignore[operator]
        theirs = loaded.base_model.model.get_submodule(site.name).get_delta_weight("default")
        assert float((update - theirs).norm() / update.norm()) == pytest.approx(export.errors[site.name], abs=1e-5)
    assert (export.worst[1] > 0) == (spec == "ept")  # the others' updates have rank 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_left_after_merging(dtype: torch.dtype) -> None:
    bare = build("llama").to(dtype)
    model = build("llama").to(dtype)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    adapters = moepeft.attach(model, moepeft.method("ept", num_tasks=3), sites=["q", "down"])
    torch.manual_seed(3)
    for parameter in adapters.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    updates = {site.name: adapters.adapters[site.name].delta_weight(2) for site in adapters.sites}  # type: ignore[operator]
    with pytest.raises(MissingRouting):
        adapters.merge_and_detach()
    assert adapters.merge_and_detach(task=2) is model
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        start = bare.state_dict()[name]
        update = updates.get(name.removesuffix(".weight"))
        expected = start if update is None else (start.double() + update.double()).to(dtype)
        assert torch.allclose(value, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-7), name
        assert value.dtype == dtype


def test_merging_without_a_copy_has_no_way_back() -> None:
    adapters, task = adapted("moelora", "bert")
    inputs = batch(adapters.model)
    expected = routed(adapters, inputs, task)
    adapters.merge(task=task, keep=False)
    assert adapters.merged
    assert not adapters.state.kept
    assert torch.allclose(routed(adapters, inputs, task), expected, atol=1e-5)
    for back in (adapters.unmerge, adapters.detach, adapters.disabled().__enter__):
        with pytest.raises(NotMergeable, match="keep=False"):
            back()
    with pytest.raises(NotMergeable, match="task=0"):
        adapters.merge_and_detach(task=0)
    assert torch.allclose(output(adapters.merge_and_detach(), inputs), expected, atol=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_a_merge_that_fails_changes_no_weight(keep: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = moepeft.attach(model, moepeft.method("lora", rank=2))
    for parameter in adapters.parameters():
        parameter.data.fill_(1.0)
    adapters.adapters["2"].B.data.fill_(float("inf"))  # the second layer of two
    with pytest.raises(NotMergeable, match="not finite"):
        adapters.merge(keep=keep)
    assert not adapters.merged
    adapters.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("host", ["bert", "gpt2"])
def test_tucka_is_exported_for_one_routing(host: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapters, _ = adapted("tucka", host)
    inputs = batch(adapters.model)
    with adapters.recording() as stats:
        expected = routed(adapters, inputs, None)
    gates = stats[adapters.sites[0].name]["gates"]
    export = export_lora(adapters, tmp_path, gates=gates)
    assert max(export.ranks.values()) <= adapters.factory.rank
    loaded = peft.PeftModel.from_pretrained(build(host), tmp_path)
    assert torch.allclose(output(loaded, inputs), expected, atol=1e-5, rtol=1e-5)
    with adapters.disabled():
        bare = routed(adapters, inputs, None)
    assert not torch.allclose(bare, expected, atol=1e-4)
    export_lora(adapters, tmp_path / "none", gates=0 * gates)
    idle = peft.PeftModel.from_pretrained(build(host), tmp_path / "none")
    assert torch.allclose(output(idle, inputs), bare, atol=1e-6)
    with pytest.raises(NotMergeable, match="gates="):
        export_lora(adapters, tmp_path)
    with pytest.raises(ConfigError):
        export_lora(adapters, tmp_path, gates=torch.ones(3))


def test_mixlora_says_why_no_routing_makes_it_a_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapters = moepeft.attach(build("llama"), moepeft.method("mixlora"))
    with pytest.raises(NotMergeable, match="every token has its own experts"):
        export_lora(adapters, tmp_path, gates=torch.ones(8))


@pytest.mark.parametrize("host", ["t5", "llama"])
def test_beams_are_known_however_generate_is_told(host: str) -> None:
    """By keyword, in a configuration by keyword or by position, or in the model's own configuration."""
    model, ids = build(host).eval(), torch.tensor([0, 1, 2, 0])
    adapters = moepeft.attach(model, moepeft.method("moelora", num_tasks=3, rank=4, num_experts=2))
    for parameter in adapters.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    inputs = batch(model)["input_ids"]
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    options |= {"decoder_start_token_id": 0} if host == "t5" else {}
    config = GenerationConfig(**options)
    with adapters.route(task_ids=ids):
        wanted = model.generate(inputs, **options)
        assert torch.equal(model.generate(inputs, generation_config=config), wanted)
        assert torch.equal(model.generate(inputs, config), wanted)
        model.generation_config = config
        assert torch.equal(model.generate(inputs), wanted)


def test_a_second_argument_of_generate_is_what_the_model_calls_it() -> None:
    """BLIP-2 gets its prompt second, and no configuration."""

    class Captioner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.generation_config = nn.Linear(4, 4), GenerationConfig(num_beams=2)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.layer(pixels)

        def generate(self, pixels: Tensor, prompt: Tensor, **options: Any) -> Tensor:
            return self(pixels.repeat_interleave(options.get("num_beams", 2), dim=0)) + prompt.sum()

    model, x = Captioner(), torch.randn(3, 5, 4)
    adapters = moepeft.attach(model, moepeft.method("moelora", num_tasks=3, rank=4, num_experts=2))
    for parameter in adapters.parameters():
        parameter.data.add_(1.0)
    wanted = model(x.repeat_interleave(2, dim=0), task_ids=torch.arange(3).repeat_interleave(2)) + 3
    with adapters.route(task_ids=torch.arange(3)):
        assert torch.equal(model.generate(x, torch.arange(3)), wanted)
