"""What trains beside the adapters: named at `attach`, in every list and file, given back by `detach`."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
)

import moepeft
from moepeft.errors import AdapterFileError, MissingRouting, NoMatchingSite, Unsupported
from tests.support import fresh_classifier


def config(kind: type = BertConfig, **more: float) -> BertConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(**sizes, vocab_size=20, **more)


class Tail(nn.Module):
    """A head with running statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, affine=False)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 8)
        self.head = Tail()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


def test_a_head_trains_is_saved_and_leaves(tmp_path: Path) -> None:
    model, x = Network(), torch.randn(16, 8)
    model.body.bias.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapters = moepeft.attach(model, moepeft.method("ept", num_tasks=2, kernels=(2, 2, 4, 4)), train=["head"])
    assert [site.name for site in adapters.sites] == ["body"]  # what trains whole carries no adapter
    names = [name for name, _ in adapters.named_parameters()]
    assert names[-2:] == ["head.out.weight", "head.out.bias"]
    assert "head" in adapters.summary()
    count = adapters.parameter_count()
    assert (count.beside, count.base) == (18, 72)
    assert count.total == count.closed_form
    optimiser = torch.optim.SGD(adapters.parameters(), lr=0.1)
    ids = torch.arange(16) % 2
    (model(x, task_ids=ids).square().mean() + adapters.aux_loss()).backward()
    optimiser.step()
    adapters.save(tmp_path)

    again = Network()
    moepeft.load(again, tmp_path)
    assert torch.equal(again.eval()(x, task_ids=ids), model.eval()(x, task_ids=ids))
    assert json.loads((tmp_path / "adapter.json").read_text())["train"] == ["head"]
    assert moepeft.attachment(again).state.train == ("head",)
    adapters.detach()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_folder_without_its_head_or_with_another_is_refused(tmp_path: Path) -> None:
    adapters = moepeft.attach(Network(), moepeft.method("lora", rank=2), train=["head.out"])
    adapters.save(tmp_path)
    path = tmp_path / "trained.safetensors"
    content = path.read_bytes()
    path.unlink()
    for target in (adapters.restore, lambda folder: moepeft.load(Network(), folder)):
        with pytest.raises(AdapterFileError, match="incomplete"):
            target(tmp_path)
    moepeft.attach(Network(), moepeft.method("lora", rank=2), train=[]).save(tmp_path)
    path.write_bytes(content)
    with pytest.raises(AdapterFileError, match=r"head\.out\.weight"):
        moepeft.load(Network(), tmp_path)


@pytest.mark.parametrize("names", [["haed"], ["head", "norm"], "head"])
def test_names_that_mean_nothing_are_refused(names: list[str]) -> None:
    model = Network()
    with pytest.raises(NoMatchingSite):
        moepeft.attach(model, moepeft.method("lora"), train=names)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_new_head_left_frozen_is_named(tmp_path: Path) -> None:
    """New to transformers: no checkpoint had it. All of what is new is named, whatever part the caller named."""
    BertModel(config()).save_pretrained(tmp_path / "bert")
    BertForSequenceClassification(config()).save_pretrained(tmp_path / "classifier")
    DistilBertModel(config(DistilBertConfig, dim=16, hidden_dim=16, n_layers=1, n_heads=2)).save_pretrained(
        tmp_path / "d"
    )
    lora = moepeft.method("lora", rank=2)
    with pytest.warns(UserWarning, match=r"train=\['classifier'\]"):
        moepeft.attach(BertForSequenceClassification.from_pretrained(tmp_path / "bert"), lora)
    with pytest.warns(UserWarning, match=r"train=\['pre_classifier'\]"):
        moepeft.attach(DistilBertForSequenceClassification.from_pretrained(tmp_path / "d"), lora, train=["classifier"])
    with pytest.warns(UserWarning, match=r"train=\['classifier'\]"):
        moepeft.attach(BertForSequenceClassification(config()), lora)  # made from a configuration
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = BertForSequenceClassification.from_pretrained(tmp_path / "bert")
        moepeft.attach(new, lora, train=["classifier"]).save(tmp_path / "saved")
        moepeft.load(BertForSequenceClassification.from_pretrained(tmp_path / "bert"), tmp_path / "saved")
        moepeft.attach(BertForSequenceClassification.from_pretrained(tmp_path / "classifier"), lora)
        moepeft.attach(BertForSequenceClassification(config()), lora, train=[])
        moepeft.attach(BertForSequenceClassification(config()), lora, sites=["query", "classifier"])


def test_what_no_checkpoint_had_is_not_the_bases(tmp_path: Path) -> None:
    """The pooler of a base saved without one is drawn anew at every reading, and adapters go on fitting."""
    BertModel(config(), add_pooling_layer=False).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"bert\.pooler\.dense"):
        adapters = moepeft.attach(model, moepeft.method("lora", rank=2), train=["classifier"])
    adapters.save(tmp_path / "saved")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert not torch.equal(again.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    with pytest.warns(UserWarning, match=r"bert\.pooler\.dense"):
        moepeft.load(again, tmp_path / "saved")


def test_what_a_neighbour_trained_or_merged_is_not_the_bases(tmp_path: Path) -> None:
    def base() -> BertForSequenceClassification:
        torch.manual_seed(0)
        return BertForSequenceClassification(config()).eval()

    model, x = base(), torch.randint(20, (4, 5))
    one = moepeft.attach(model, moepeft.method("lora", rank=2), sites=["query"], train=["classifier"])
    two = moepeft.attach(model, moepeft.method("lora", rank=2), sites=["value"], train=[])
    for parameter in (*one.parameters(), *two.parameters()):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    expected = model(x).logits
    one.merge()
    one.save(tmp_path / "one")
    two.save(tmp_path / "two")
    for order in (("one", "two"), ("two", "one")):
        again = base()
        for name in order:
            moepeft.load(again, tmp_path / name)
        assert torch.allclose(again(x).logits, expected, atol=1e-6)
    two.detach()
    moepeft.load(model, tmp_path / "two")  # beside a neighbour that is merged
    assert torch.allclose(model(x).logits, expected, atol=1e-6)


def per_task(tmp_path: Path) -> tuple[BertForSequenceClassification, moepeft.Attachment, Tensor]:
    """A model whose three tasks have heads of their own, all away from their start."""
    BertModel(config(hidden_dropout_prob=0.0)).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    adapters = moepeft.attach(model, moepeft.method("moelora", num_tasks=3), train_per_task=["classifier"])
    torch.manual_seed(1)
    for parameter in adapters.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model, adapters, torch.randint(20, (6, 5))


def test_every_task_has_its_own_head(tmp_path: Path) -> None:
    """Held to a model per task, which has that task's head and update as plain weights."""
    model, adapters, x = per_task(tmp_path)
    assert adapters.parameter_count().beside == 3 * (16 * 2 + 2)
    ids = torch.tensor([2, 0, 1, 1, 0, 2])
    routed = model(x, task_ids=ids).logits
    routed.sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters())
    assert model.classifier.weight.grad is None
    keys = set(BertForSequenceClassification(config()).state_dict())
    for task in range(3):
        alone = copy.deepcopy(model)
        plain = moepeft.attachment(alone).merge_and_detach(task=task)
        assert set(plain.state_dict()) == keys
        rows = ids == task
        assert torch.allclose(plain(x[rows]).logits, routed[rows], atol=1e-5)
        other = plain(x[~rows]).logits
        assert not torch.allclose(other, routed[~rows], atol=1e-3)

    adapters.merge(task=2)
    with adapters.disabled():
        bare = model(x).logits
    adapters.unmerge()
    with adapters.disabled():
        assert torch.equal(model(x, task_ids=ids).logits, bare)
    assert torch.equal(model(x, task_ids=ids).logits, routed)
    adapters.add_tasks(1)
    assert torch.equal(model(x, task_ids=ids).logits, routed)
    assert model(x, task_ids=3).logits.shape == (6, 2)
    assert set(adapters.detach().state_dict()) == keys


def test_heads_per_task_are_saved_and_loaded_and_need_tasks(tmp_path: Path) -> None:
    model, adapters, x = per_task(tmp_path)
    adapters.save(tmp_path / "saved")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()  # its own head is another one
    loaded = moepeft.load(again, tmp_path / "saved")
    assert torch.equal(again(x, task_ids=[0, 1, 2, 2, 1, 0]).logits, model(x, task_ids=[0, 1, 2, 2, 1, 0]).logits)
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in adapters.named_parameters()}
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.restore(tmp_path / "saved")
    assert torch.equal(again(x, task_ids=1).logits, model(x, task_ids=1).logits)
    with pytest.raises(MissingRouting):
        again(x)
    bare = loaded.detach()
    with pytest.raises(Unsupported, match="lora-per-task"):
        moepeft.attach(bare, moepeft.method("lora"), train_per_task=["classifier"])
    assert not hasattr(bare.classifier, "moepeft_heads")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.exhaustive), "trainer"])
def test_a_classifier_goes_on_in_a_fresh_process_after_a_move(kind: str, tmp_path: Path) -> None:
    """Saved after two steps, moved with its base, loaded: the same predictions, and the same third and fourth step."""
    before, after = tmp_path / "before", tmp_path / "after"
    BertModel(config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).save_pretrained(before / "base")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = BertForSequenceClassification.from_pretrained(before / "base")
        adapters = moepeft.attach(model, moepeft.method("ept", num_tasks=2, kernels=(2, 2, 4, 4)), train=["classifier"])
        if kind == "trainer":
            runner = fresh_classifier.trainer(model, before / "run", 2)
            runner.train()
            predicted = fresh_classifier.logits(model)
            runner.args.max_steps = 4
            runner.train(resume_from_checkpoint=str(before / "run" / "checkpoint-2"))
        else:
            optimiser = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
            fresh_classifier.train(adapters, optimiser, 2)
            adapters.save(before / "run")
            torch.save(optimiser.state_dict(), before / "optimiser.pt")
            predicted = fresh_classifier.logits(model)
            fresh_classifier.train(adapters, optimiser, 2)
        resumed = fresh_classifier.logits(model)
    finally:
        torch.set_num_threads(threads)
    before.rename(after)
    command = [sys.executable, "-m", "tests.support.fresh_classifier", str(after), kind]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[3])
    found = load_file(after / "found.safetensors")
    assert torch.equal(found["predicted"], predicted)
    assert torch.equal(found["resumed"], resumed)
    assert not torch.equal(predicted, resumed)
