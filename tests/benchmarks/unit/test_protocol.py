"""Protocols, flags, cells and backbones: what is validated before anything runs."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import moepeft
from benchmarks.backbones.device import resolve_device, resolve_precision
from benchmarks.backbones.load import find_backbone, load_backbone, load_tokenizer, set_dropout
from benchmarks.cells.train import Trainer, _decay_groups
from benchmarks.instruments.processor import prepare_device
from benchmarks.methods.parse import parse_methods
from benchmarks.plan.cells import expand
from benchmarks.plan.options import Options, resolve_suite
from benchmarks.protocols.errors import UsageError
from benchmarks.protocols.protocol import Suite, available_suites, load_suite
from benchmarks.records.failures import Diverged, one_line, status_of, without_paths
from benchmarks.records.identity import budget_differences, left_behind
from benchmarks.records.provenance import ROOT, gather
from benchmarks.records.schema import Budget, RunRecord, Tuning
from benchmarks.run import main
from benchmarks.tasks import TASKS
from benchmarks.tasks.base import TaskData, TaskSpec
from tests.support.record_factory import make_record

SPEC = TaskSpec("classes", "classification", ("no", "yes"), "accuracy")


def suite(**fields: object) -> Suite:
    return Suite.model_validate({"name": "test", "tasks": ("classes",), "steps": 4, "precision": "fp32", **fields})


def data(fingerprint: str = "f" * 64) -> tuple[TaskData, ...]:
    return (TaskData(SPEC, (), (), "hand-made", fingerprint),)


# ---------------------------------------------------------------------- protocol files


@pytest.mark.parametrize("name", available_suites())
def test_shipped_suites_name_tasks_that_exist(name):
    loaded = load_suite(name)
    assert loaded.name == name
    assert set(loaded.tasks) <= set(TASKS)


def test_a_protocol_of_ones_own_is_a_toml_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('tasks = ["cola"]\nsteps = 3\nseeds = [4, 5]\n[timing]\nrows = 2\n')
    loaded = load_suite(str(path))
    assert (loaded.name, loaded.tasks, loaded.steps, loaded.seeds, loaded.timing.rows) == (
        "mine",
        ("cola",),
        3,
        (4, 5),
        2,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "not a TOML file"),
        ('tasks = ["cola"]', "steps: Field required"),
        ('tasks = ["cola"]\nsteps = 0', "steps: Input should be greater than 0, got 0"),
        ('tasks = ["cola"]\nsteps = 1\nstep = 2', "step: Extra inputs are not permitted, got 2"),
        ("tasks = []\nsteps = 1", "tasks: Tuple should have at least 1 item"),
        ('tasks = ["cola", "cola"]\nsteps = 1', "tasks lists cola twice"),
        ('tasks = ["cola"]\nsteps = 1\nseeds = [1, 1]', "seeds lists 1 twice"),
        ('tasks = ["cola"]\nsteps = 1\nwarmup_ratio = 1.0', "warmup_ratio: Input should be less than 1"),
    ],
)
def test_a_wrong_protocol_is_told_in_one_line(tmp_path, text, message):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load_suite(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_protocols_are_frozen_and_overrides_are_validated():
    one = suite()
    with pytest.raises(ValueError, match="frozen"):
        one.steps = 7  # type: ignore[misc]
    assert one.with_overrides(steps=7, learning_rate=None) == suite(steps=7)
    with pytest.raises(UsageError, match="batch_size"):
        one.with_overrides(batch_size=-1)
    assert suite(steps=200, warmup_ratio=0.1).warmup_steps == 20


# ---------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite", "glu"], "unknown suite 'glu': give commonsense, "),
        (["--steps", "0"], "steps: Input should be greater than 0"),
        (["--tasks", "q_kola"], "there is no task 'q_kola'. Did you mean q_cola"),
        (["--tasks", ","], "tasks: Tuple should have at least 1 item"),
        (["--tasks", "cola,cola"], "tasks lists cola twice"),
        (["--seeds=-1,0"], "seeds.0: Input should be greater than or equal to 0, got -1"),
        (["--seeds", "1,1"], "seeds lists 1 twice"),
        (["--data-dir", "/no/such/folder"], "--data-dir /no/such/folder: no such folder"),
        (["--methods", ","], "names no method"),
        (["--methods", "lorra"], "Did you mean lora"),
        (["--methods", "lora@nightly"], "'lora' has no preset 'nightly'"),
        (["--backbone", "nothing"], "unknown backbone 'nothing'"),
        (["--reference", "lorra"], "Did you mean lora"),
        (["--reference", "lora@nightly"], "'lora' has no preset 'nightly'"),
        (["--methods", "lora", "--reference", "ept"], "--reference ept: no run of it is asked for or stored"),
        (["--results", __file__], "is a file; give a folder"),
        (["--results", f"{__file__}/deeper/still"], f"{__file__} is a file; give a folder"),
    ],
)
def test_wrong_flags_end_in_one_line_and_before_anything_is_loaded(flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmarks.plan.study.load_task", lambda *_, **__: pytest.fail("loaded data"))
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_flags_override_the_suite_and_tasks_keep_one_order():
    found = resolve_suite(
        Options(suite="glue", tasks=("rte", "cola"), seeds=(2, 0), steps=5, eval_rows=9, precision="bf16")
    )
    assert (found.tasks, found.seeds, found.steps, found.eval_rows) == (("cola", "rte"), (2, 0), 5, 9)
    assert found.precision == "bf16"
    assert found.learning_rate == load_suite("glue").learning_rate


def test_launched_processes_have_a_gpu_each(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    before = torch.get_float32_matmul_precision()
    try:
        for rank in ("0", "1", "2"):
            monkeypatch.setenv("LOCAL_RANK", rank)
            prepare_device(resolve_device("auto"))
    finally:
        torch.set_float32_matmul_precision(before)
    assert current == [torch.device("cuda", at) for at in (0, 1, 0)]


def test_device_and_precision(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == torch.device("cpu")
        with pytest.raises(UsageError, match="no CUDA device"):
            resolve_device("cuda")
    assert resolve_precision("fp32", "cpu") == "fp32"
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        assert resolve_precision("auto", "cpu") == ("bf16" if native else "fp32")


# ---------------------------------------------------------------------- cells


def test_baselines_come_first_and_all_means_every_registered_method():
    assert list(
        parse_methods(
            (
                "lora",
                "head",
            ),
            num_tasks=3,
        )
    ) == ["majority", "head", "lora"]
    assert list(parse_methods(("all",), num_tasks=3)) == ["majority", "head", *moepeft.available()]
    assert parse_methods(("ept",), num_tasks=3)["ept"].config()["num_tasks"] == 3


def test_cells_are_what_decides_a_result():
    methods = parse_methods(("lora",), num_tasks=1)

    def ids(rows: tuple[TaskData, ...] = data(), **fields: object) -> list[str]:
        return [
            planned.cell.id
            for planned in expand(suite(**fields).protocol, methods.values(), rows, suite(**fields).seeds)
        ]

    base = ids()
    assert len(set(base)) == 3
    assert ids() == base
    # Another seed is another cell; asking for several seeds changes none of them.
    assert ids(seeds=(0, 1))[:3] == base
    assert len(set(ids(seeds=(0, 1)))) == 6
    for changed in (ids(steps=5), ids(precision="bf16"), ids(name="other"), ids(rows=data("e" * 64))):
        assert not set(changed) & set(base)


def record(method: str, seed: int = 0, **changes: object) -> RunRecord:
    factories = parse_methods((method, "lora"), num_tasks=1)
    (planned,) = [
        one for one in expand(suite().protocol, factories.values(), data(), (seed,)) if one.cell.method == method
    ]
    fields = {
        "order_hash": "a" * 64, "steps": 4, "rows": 8, "sequences": 8, "tokens": 80, "padded_tokens": 96,
        "rows_per_task": {"classes": 8},
    }  # fmt: skip
    status = changes.pop("status", "ok")
    return RunRecord.model_validate(
        {
            "cell": planned.cell,
            "status": status,
            "budget": Budget.model_validate({**fields, **changes}),
            "provenance": gather(torch.device("cpu"), "fp32", "test"),
        }
    )


def test_unequal_budgets_are_found():
    assert budget_differences([record("head"), record("lora"), record("lora", seed=1, order_hash="b" * 64)]) == []
    assert budget_differences([record("head"), record("lora", optimiser="one update less")])
    (problem,) = budget_differences([record("head"), record("lora", tokens=81)])
    assert "lora" in problem
    assert "tokens 81 and 80" in problem
    assert "order_hash" not in problem
    assert budget_differences([record("head"), record("lora", steps=1, status="diverged")]) == []


def test_a_method_without_vectors_has_the_same_budget_as_one_with_some():
    """Vectors never decay. LoRA has matrices alone, MoRE has vectors too, and both consume the same."""
    accounts = set()
    for shapes in ([(2, 2)], [(2, 2), (2,)]):
        groups = _decay_groups([nn.Parameter(torch.zeros(shape)) for shape in shapes], 1e-3, 0.01)
        optimiser = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0)
        accounts.add(Trainer.account(SimpleNamespace(optimiser=optimiser, schedule=schedule, clip_norm=1.0)))
    assert len(accounts) == 1


def test_runs_at_a_rate_that_is_no_longer_chosen_are_named():
    tuned = Tuning(rates=(1e-3, 2e-3), seed=1000, steps=20, head_learning_rate=None)
    old, new, other = (
        make_record(method, protocol={"learning_rate": rate}, tuned=tuned)[0]
        for method, rate in (("alpha", 1e-3), ("alpha", 2e-3), ("bravo", 1e-3))
    )
    assert left_behind([old, new, other], [new.cell, other.cell]) == [old]
    longer = make_record("alpha", protocol={"learning_rate": 1e-3, "steps": 200}, tuned=tuned)[0]
    assert left_behind([longer, new], [new.cell]) == []


def test_failures_are_classified_and_carry_no_path_of_this_machine():
    assert status_of(Diverged("x")) == "diverged"
    assert status_of(moepeft.errors.Unsupported("x")) == "unsupported"
    assert status_of(moepeft.errors.NoMatchingSite("x")) == "unsupported"
    assert status_of(torch.OutOfMemoryError("x")) == status_of(MemoryError()) == "oom"
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert status_of(caught.value) == "oom"
    assert status_of(ValueError("x")) == "error"
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert without_paths(f"in {ROOT}/benchmarks/run.py") == "in benchmarks/run.py"


def test_provenance_names_the_machine_and_the_packages():
    found = gather(torch.device("cpu"), "fp32", "the command")
    assert found.packages["torch"] == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert "core" in found.device
    assert (found.commit is None) == (found.dirty is None)


# ---------------------------------------------------------------------- backbones


def test_a_local_folder_is_named_by_its_content_not_by_its_path(tmp_path):
    tiny = find_backbone("tiny-bert")
    for parent in ("here", "there"):
        load_backbone(tiny, "encoder", dropout=None).save_pretrained(tmp_path / parent / "bert")
        load_tokenizer(tiny).save_pretrained(tmp_path / parent / "bert")
    here, there = (find_backbone(str(tmp_path / parent / "bert")) for parent in ("here", "there"))
    assert here.identity == there.identity
    assert re.fullmatch(r"bert@[0-9a-f]{12}", here.identity)
    loaded = load_backbone(here, "encoder", dropout=0.0)
    original = load_backbone(tiny, "encoder", dropout=0.0)
    for (name, one), (_, other) in zip(loaded.named_parameters(), original.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert load_tokenizer(here)("a cat")["input_ids"] == load_tokenizer(tiny)("a cat")["input_ids"]
    (tmp_path / "there" / "bert" / "config.json").write_text("{}")
    assert find_backbone(str(tmp_path / "there" / "bert")).identity != here.identity
    shutil.rmtree(tmp_path / "here" / "bert")
    (tmp_path / "here" / "bert").mkdir()
    with pytest.raises(UsageError, match=r"no config\.json"):
        find_backbone(str(tmp_path / "here" / "bert"))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    tiny = find_backbone("tiny-bert")
    load_backbone(tiny, "encoder", dropout=None).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no tokenizer"):
        find_backbone(str(tmp_path))
    # A file that is there but knows no word is no better.
    tokenizer = load_tokenizer(tiny)
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"] = {tokenizer.unk_token: 0}
    content["added_tokens"], content["post_processor"] = [], None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="no tokenizer that knows words"):
        load_tokenizer(find_backbone(str(tmp_path)))


def test_own_tasks_are_named_by_their_files_and_stand_last():
    found = resolve_suite(Options(suite="glue", tasks=("mine.toml", "rte", "cola")))
    assert found.tasks == ("cola", "rte", "mine.toml")


def test_hub_ids_may_carry_a_revision():
    found = find_backbone("org/model@abc123")
    assert (found.identity, found.location, found.revision) == ("org/model@abc123", "org/model", "abc123")
    assert find_backbone("deberta-v3-base").location == "microsoft/deberta-v3-base"
    assert "MNLI" in (find_backbone("minilm").note or "")


def test_encoders_are_frozen_without_pooler_and_with_the_dropout_asked_for():
    from transformers import BertConfig, T5Config

    encoder = load_backbone(find_backbone("tiny-bert"), "encoder", dropout=0.25)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.pooler is None
    assert {module.p for module in encoder.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}
    config = T5Config()
    set_dropout(config, 0.5)
    assert config.dropout_rate == 0.5
    untouched = BertConfig()
    set_dropout(untouched, None)
    assert untouched.hidden_dropout_prob == 0.1


# ---------------------------------------------------------------------- no method is special
