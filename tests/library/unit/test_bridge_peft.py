"""LoRA checkpoints to and from the peft package, held to peft's own outputs; peft's methods as baselines."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moepeft
from benchmarks.methods.peft import BASELINES, PeftMethod, attach_peft
from moepeft.bridges.peft_checkpoints import PeftMissing, export_all_tasks, export_lora, import_lora
from moepeft.errors import (
    AdapterFileError,
    AlreadyAttached,
    MissingRouting,
    NotMergeable,
    UnknownMethod,
    Unsupported,
)
from moepeft.methods.lora import LoRA
from tests.support.hosts import batch, build, output, rows_of

peft = pytest.importorskip("peft")

TASKS = 3
SHAPED = ["lora", "moelora", "moelora@released", "more", "more@released", "moslora", "mtl-lora", "lora-per-task"]


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    return output(model, inputs, **more)


def perturb(parameters: Any, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(scale * noise.to(parameter.dtype))


@pytest.mark.parametrize("host", ["bert", "t5", "llama", "gpt2"])
@pytest.mark.parametrize("spec", SHAPED)
def test_exported_checkpoint_is_reproduced_by_peft(host: str, spec: str, tmp_path: Path) -> None:
    model = build(host).double()  # in float32 the order of additions alone costs T5 2e-5
    fields = {"layout": "batch_first"} if spec == "moelora@released" else {}
    adapters = moepeft.attach(model, moepeft.method(spec, num_tasks=TASKS, **fields))
    model.double()
    perturb(adapters.parameters())
    inputs = batch(model, padded=2)
    by_task = adapters.factory.capabilities.routing == "task"
    outputs = []
    for task in range(TASKS) if by_task else [None]:
        expected = run(model, inputs, **({} if task is None else {"task_ids": torch.full((4,), task)}))
        export_lora(adapters, tmp_path / f"{task}", task=task)
        loaded = peft.PeftModel.from_pretrained(build(host).double(), tmp_path / f"{task}").double()
        assert torch.allclose(run(loaded, inputs), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(run(build(host).double(), inputs), expected, atol=1e-2)
        outputs.append(expected)
    assert all(not torch.allclose(outputs[0], other, atol=1e-3) for other in outputs[1:])


@pytest.mark.parametrize("spec", SHAPED)
def test_exported_factors_are_exact_in_double_precision(spec: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Sequential(nn.Linear(7, 5))).double()
    base = copy.deepcopy(model)
    adapters = moepeft.attach(model, moepeft.method(spec, num_tasks=TASKS))
    model.double().eval()
    perturb(adapters.parameters(), 0.5)
    task = 1 if adapters.factory.capabilities.routing == "task" else None
    x = torch.randn(4, 3, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x) if task is None else model(x, task_ids=torch.full((4,), task))
    export_lora(adapters, tmp_path, task=task)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.allclose(loaded(x), expected, atol=1e-12)


def test_export_refuses_what_is_no_fixed_change_of_the_weights(tmp_path: Path) -> None:
    for spec, error, message, task in (
        ("mixlora", NotMergeable, "every token has its own experts", None),
        ("tucka", NotMergeable, "mean input of each batch", None),
        ("more", MissingRouting, r"merge\(task=", None),
        ("lora", MissingRouting, "without task", 1),
    ):
        adapters = moepeft.attach(build("bert"), moepeft.method(spec, num_tasks=TASKS))
        with pytest.raises(error, match=message):
            export_lora(adapters, tmp_path / spec, task=task)
        assert not (tmp_path / spec).exists()


MERGEABLE = [name for name in moepeft.available() if moepeft.method(name).capabilities.not_mergeable is None]


def adapted(spec: str, host: str = "bert") -> tuple[moepeft.Attachment, dict[str, Tensor], int | None]:
    model = build(host)
    adapters = moepeft.attach(model, moepeft.method(spec, num_tasks=TASKS))
    perturb(adapters.parameters())
    return adapters, batch(model, padded=2), 1 if adapters.factory.capabilities.routing == "task" else None


@pytest.mark.parametrize("host", ["bert", "t5", "llama"])
@pytest.mark.parametrize("spec", MERGEABLE)
def test_every_mergeable_method_is_reproduced_by_peft_at_full_rank(spec: str, host: str, tmp_path: Path) -> None:
    adapters, inputs, task = adapted(spec, host)
    expected = run(adapters.model, inputs, **({} if task is None else {"task_ids": torch.full((4,), task)}))
    export = export_lora(adapters, tmp_path, task=task)
    assert set(export.ranks) == {site.name for site in adapters.sites}
    assert max(export.errors.values()) == 0
    loaded = peft.PeftModel.from_pretrained(build(host), tmp_path)
    assert torch.allclose(run(loaded, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", MERGEABLE)
def test_a_cut_export_is_the_best_of_its_rank_and_says_what_is_lost(
    spec: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapters, _, task = adapted(spec)
    export = export_lora(adapters, tmp_path, task=task, rank=1)
    assert set(export.ranks.values()) == {1}
    written = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for site in adapters.sites:
        update = adapters.adapters[site.name].delta_weight(task).detach()  # type: ignore[operator]
        A, B = (written[f"base_model.model.{site.name}.lora_{letter}.weight"] for letter in "AB")
        assert (A.shape[0], B.shape[1]) == (1, 1)
        left = torch.linalg.svdvals(update - config["lora_alpha"] / config["r"] * B @ A)
        all_of_it = torch.linalg.svdvals(update)
        # Eckart and Young: what is left has the singular values that were not kept.
        assert torch.allclose(left[: len(all_of_it) - 1], all_of_it[1:], atol=1e-5 * float(all_of_it[0]))
        assert export.errors[site.name] == pytest.approx(float(all_of_it[1:].norm() / all_of_it.norm()), abs=1e-5)
    worst, error = export.worst
    assert error == max(export.errors.values()) > 0
    (warning,) = caplog.records
    assert worst in warning.getMessage()


def test_a_rank_above_the_updates_own_is_padded_and_exact(tmp_path: Path) -> None:
    adapters, inputs, task = adapted("ept")
    expected = run(adapters.model, inputs, task_ids=torch.full((4,), task))
    own = max(export_lora(adapters, tmp_path / "own", task=task).ranks.values())
    export = export_lora(adapters, tmp_path / "padded", task=task, rank=own + 3)
    assert set(export.ranks.values()) == {own + 3}
    loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "padded")
    assert torch.allclose(run(loaded, inputs), expected, atol=1e-5, rtol=1e-5)


def test_one_folder_for_each_task(tmp_path: Path) -> None:
    adapters, inputs, _ = adapted("moelora")
    exports = export_all_tasks(adapters, tmp_path, names=("a", "b", "c"), rank=16)
    assert [export.folder.name for export in exports] == ["a", "b", "c"]
    for task, export in enumerate(exports):
        loaded = peft.PeftModel.from_pretrained(build("bert"), export.folder)
        expected = run(adapters.model, inputs, task_ids=torch.full((4,), task))
        assert torch.allclose(run(loaded, inputs), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(Unsupported, match="2 names for 3 tasks"):
        export_all_tasks(adapters, tmp_path, names=("a", "b"))
    with pytest.raises(Unsupported, match="export_lora"):
        export_all_tasks(adapted("lora")[0], tmp_path)


def trained_by_peft(host: str, folder: Path, *, double: bool = False, **options: Any) -> tuple[nn.Module, Any]:
    """A peft checkpoint with random factors, and the peft model that wrote it."""
    model = build(host).double() if double else build(host)
    targets = [site.name for site in moepeft.find_sites(model) if site.layer is not None]
    options = {"target_modules": targets, "fan_in_fan_out": host == "gpt2", **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    perturb(p for p in wrapped.parameters() if p.requires_grad)
    wrapped.save_pretrained(folder, save_embedding_layers=False)  # older releases look for the base on the hub
    return wrapped, options


@pytest.mark.parametrize("host", ["bert", "t5", "llama", "gpt2"])
@pytest.mark.parametrize("options", [{"r": 4, "lora_alpha": 24}, {"r": 5, "lora_alpha": 7, "use_rslora": True}])
def test_imported_checkpoint_equals_peft_to_the_last_bit(host: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs, _ = trained_by_peft(host, tmp_path, double=True, **options)
    ours = build(host).double()
    adapters = import_lora(ours, tmp_path)
    inputs = batch(ours, padded=2)
    assert torch.equal(run(ours, inputs), run(theirs, inputs))
    assert adapters.factory == LoRA(
        rank=options["r"], alpha=options["lora_alpha"], rslora=options.get("use_rslora", False)
    )


def test_imported_checkpoint_in_single_precision(tmp_path: Path) -> None:
    theirs, _ = trained_by_peft("bert", tmp_path, target_modules=["query", "value"], lora_dropout=0.1)
    ours = build("bert")
    adapters = import_lora(ours, tmp_path)
    assert {site.role for site in adapters.sites} == {"q", "v"}
    assert adapters.factory.dropout == 0.1
    inputs = batch(ours)
    assert torch.allclose(run(ours, inputs), run(theirs, inputs), atol=1e-6)


def test_import_undoes_export(tmp_path: Path) -> None:
    model = build("t5")
    adapters = moepeft.attach(model, LoRA(rank=3, alpha=10.0, rslora=True, dropout=0.2), sites=["q", "down"])
    perturb(adapters.parameters())
    export_lora(adapters, tmp_path)
    again = import_lora(build("t5"), tmp_path)
    assert again.factory == adapters.factory
    assert again.sites == adapters.sites
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in adapters.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["pooler"]}, r"modules_to_save=\['pooler'\]"),
        ({"rank_pattern": {"query": 2}}, "rank_pattern="),
        ({"alpha_pattern": {"query": 2}}, "alpha_pattern="),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"target_modules": ["query", "word_embeddings"]}, "lora_embedding_A"),
    ],
)
def test_variants_of_lora_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    trained_by_peft("bert", tmp_path, **options)
    with pytest.raises(Unsupported, match=message):
        import_lora(build("bert"), tmp_path)


def test_other_methods_and_unknown_fields_are_refused(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(build("bert"), peft.VeraConfig(target_modules=["query"]))
    wrapped.save_pretrained(tmp_path / "vera", save_embedding_layers=False)
    with pytest.raises(Unsupported, match="VERA, wanted LORA"):
        import_lora(build("bert"), tmp_path / "vera")
    trained_by_peft("bert", tmp_path / "new")
    path = tmp_path / "new" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_next_years_variant": True}))
    with pytest.raises(Unsupported, match="use_next_years_variant=True"):
        import_lora(build("bert"), tmp_path / "new")


def test_damaged_and_foreign_checkpoints_leave_the_model_alone(tmp_path: Path) -> None:
    trained_by_peft("bert", tmp_path, r=4)
    path = tmp_path / "adapter_model.safetensors"
    whole = {name: value.clone() for name, value in load_file(path).items()}  # the file is mapped, and rewritten
    first = next(name for name in whole if name.endswith("lora_A.weight"))
    damages = {
        "incomplete": {name: value for name, value in whole.items() if name != first},
        "not finite": {**whole, first: torch.full_like(whole[first], float("nan"))},
        "no factors": {},
        "wanted rank 4": {**whole, first: whole[first][:3]},
        "holds torch.int64, wanted torch.float32": {**whole, first: whole[first].long()},
    }
    model = build("bert")
    keys = list(model.state_dict())
    for message, tensors in damages.items():
        save_file(tensors, path)
        with pytest.raises((AdapterFileError, Unsupported), match=message):
            import_lora(model, tmp_path)
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(AdapterFileError, match="not a whole safetensors file"):
        import_lora(model, tmp_path)
    with pytest.raises(AdapterFileError, match="give the folder that peft's save_pretrained wrote"):
        import_lora(model, tmp_path / "nowhere")
    save_file(whole, path)
    with pytest.raises(AdapterFileError, match="no such linear layer"):
        import_lora(build("llama"), tmp_path)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    import_lora(model, tmp_path)


def test_nested_names_are_told_apart(tmp_path: Path) -> None:
    """`0` is also the end of `2.0`: only the layer that was adapted may be."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4)))
    base = copy.deepcopy(model)
    adapters = moepeft.attach(model, LoRA(rank=2), sites=lambda site: site.name == "0")
    perturb(adapters.parameters())
    export_lora(adapters, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == 1
    x = torch.randn(2, 4)
    assert torch.allclose(loaded(x), model(x), atol=1e-6)


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained_by_peft("bert", tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    adapters = import_lora(build("bert"), tmp_path)  # reading needs no peft
    with pytest.raises(PeftMissing, match=r"pip install 'moepeft\[peft\]'"):
        export_lora(adapters, tmp_path)


# ---------------------------------------------------------------------- baselines


@pytest.mark.parametrize("host", ["bert", "t5"])
@pytest.mark.parametrize("name", BASELINES)
def test_baseline_attaches_trains_rests_and_leaves(host: str, name: str) -> None:
    model = build(host)
    inputs = batch(model, padded=2)
    keys, layers = list(model.state_dict()), dict(model.named_modules())
    model.requires_grad_(False)
    expected = run(model, inputs)
    baseline = PeftMethod.parse(f"peft:{name}", TASKS)
    adapters = baseline.attach(model)
    assert [site.name for site in adapters.sites] == [s.name for s in moepeft.attach(build(host), LoRA()).sites]
    ids = torch.tensor([0, 1, 2, 0])
    with adapters.route(task_ids=ids):
        assert torch.allclose(run(model, inputs, task_ids=ids), expected, atol=1e-5)
    optimiser = torch.optim.SGD(adapters.parameters(), lr=0.1)
    for _ in range(2):
        loss = output(model, inputs, task_ids=ids)[..., ::2].sum() + adapters.aux_loss()  # not undone by a norm
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(parameter.grad is not None for parameter in adapters.parameters())
    assert not torch.allclose(run(model, inputs, task_ids=ids), expected, atol=1e-5)
    with adapters.disabled():
        assert torch.equal(run(model, inputs), expected)
    count = adapters.parameter_count()
    assert count.total == count.closed_form == sum(p.numel() for _, p in adapters.named_parameters())
    assert count.base == sum(p.numel() for p in build(host).parameters())
    assert f"{count.total:,} trainable" in adapters.summary()
    assert adapters.aux_losses() == {}
    assert adapters.detach() is model
    assert torch.equal(run(model, inputs), expected)
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == layers
    assert not model._forward_pre_hooks
    assert not any(p.requires_grad for p in model.parameters())
    attach_peft(model, "lora")


def test_peft_lora_counts_and_starts_as_ours() -> None:
    model = build("llama")
    theirs = attach_peft(model, "lora", r=4).parameter_count()
    ours = moepeft.attach(build("llama"), LoRA(rank=4)).parameter_count()
    assert (theirs.total, theirs.base, theirs.sites) == (ours.total, ours.base, ours.sites)


def test_misuse_of_baselines_is_loud_and_leaves_the_model_alone() -> None:
    with pytest.raises(UnknownMethod, match="Did you mean dora"):
        PeftMethod.parse("peft:dorra")
    model = build("gpt2")
    layers = dict(model.named_modules())
    with pytest.raises(Unsupported, match="Conv1D"):
        attach_peft(model, "loha")
    with pytest.raises(Unsupported, match="ranks"):
        attach_peft(model, "lora", ranks=3)
    # The first layer is adapted before the second one is refused.
    mixed = nn.Sequential(nn.Linear(32, 32), model.transformer.h[0].mlp.c_fc)
    kept = dict(mixed.named_modules())
    with pytest.raises(Unsupported, match="Conv1D"):
        attach_peft(mixed, "hra")
    assert dict(mixed.named_modules()) == kept
    assert dict(model.named_modules()) == layers
    assert all(p.requires_grad for p in model.parameters())
    adapters = attach_peft(model, "ia3")
    with pytest.raises(AlreadyAttached):
        attach_peft(model, "lora")
    adapters.detach()
    moepeft.attach(model, LoRA())
    with pytest.raises(AlreadyAttached):
        attach_peft(model, "lora")


@pytest.mark.parametrize("name", ["poly", "mhr"])
def test_poly_mixes_skills_by_the_task_of_the_row(name: str) -> None:
    """A batch of mixed tasks equals its rows one by one, by call, by `route`, and in beam search."""
    model = build("t5")
    adapters = PeftMethod.parse(f"peft:{name}", TASKS).attach(model)
    perturb(adapters.parameters())
    inputs, ids = batch(model), torch.tensor([0, 1, 2, 0])
    together = run(model, inputs, task_ids=ids)
    alone = torch.cat([run(model, rows_of(inputs, [row]), task_ids=ids[[row]]) for row in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together, run(model, inputs, task_ids=ids.flip(0)), atol=1e-3)
    with adapters.route(task_ids=ids):
        assert torch.equal(run(model, inputs), together)
        source = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
        options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
        beams = model.generate(**source, **options)
    for row in range(4):
        with adapters.route(task_ids=int(ids[row])):
            assert torch.equal(model.generate(**rows_of(source, [row]), **options)[0], beams[row])
    assert adapters.parameter_count().task_tables == len(adapters.sites) * TASKS * 4 * (4 if name == "mhr" else 1)


def test_poly_refuses_rows_without_a_task() -> None:
    model = build("bert")
    PeftMethod.parse("peft:poly", TASKS).attach(model)
    with pytest.raises(MissingRouting, match="none task ids for 4 rows"):
        run(model, batch(model))
