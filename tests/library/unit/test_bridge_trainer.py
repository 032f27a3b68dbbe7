"""The Trainer of transformers, unforked, on every method: losses, routing, checkpoints, resuming."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Seq2SeqTrainingArguments,
    TrainingArguments,
)

import moepeft
from moepeft.bridges.trainer import AdapterSeq2SeqTrainer, AdapterTrainer
from moepeft.errors import AdapterFileError, MissingRouting, Unsupported
from tests.support.hosts import VOCABULARY, WIDTH, build

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

TASKS = 3
METHODS = [*moepeft.available(), "ept@released"]
every_method = pytest.mark.parametrize("spec", METHODS)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """transformers and accelerate warn of what a CPU cannot do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*", category=UserWarning)
        yield


def classifier() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def adapted_classifier(spec: str) -> tuple[nn.Module, moepeft.Attachment]:
    model = classifier()
    torch.manual_seed(1)
    return model, moepeft.attach(model, moepeft.method(spec, num_tasks=TASKS), train=["classifier"])


def classified_rows(number: int = 48, *, seed: int = 2) -> Any:
    """The label is whether the first token is in the upper half, or in the lower one for the last task."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(number):
        length = int(torch.randint(4, 9, (), generator=draw))
        ids = torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()
        task = index % TASKS
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * length,
                "labels": int(ids[0] > VOCABULARY // 2) ^ (task == TASKS - 1),
                "task_ids": task,
                "comment": "a column that no model reads",
            }
        )
    return datasets.Dataset.from_list(rows)


def translated_rows(number: int = 24) -> Any:
    """The target is the source's first three tokens, shifted by the task."""
    rows = []
    for row in classified_rows(number):
        target = [3 + (token + 5 * row["task_ids"]) % (VOCABULARY - 3) for token in row["input_ids"][:3]]
        rows.append({**row, "labels": [*target, 1]})
    return datasets.Dataset.from_list(rows)


def arguments(folder: Path, *, kind: type[TrainingArguments] = TrainingArguments, **more: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "seed": 3,
    }
    return kind(**{**options, **more})


def classification_trainer(model: nn.Module, folder: Path, **more: Any) -> AdapterTrainer:
    return AdapterTrainer(
        model=model,
        args=arguments(folder, **more),
        train_dataset=classified_rows(),
        eval_dataset=classified_rows(9, seed=4),
        data_collator=DataCollatorWithPadding(ByT5Tokenizer()),
    )


def translation_trainer(model: nn.Module, folder: Path, **more: Any) -> AdapterSeq2SeqTrainer:
    return AdapterSeq2SeqTrainer(
        model=model,
        args=arguments(folder, kind=Seq2SeqTrainingArguments, **more),
        train_dataset=translated_rows(),
        eval_dataset=translated_rows(9),
        data_collator=DataCollatorForSeq2Seq(ByT5Tokenizer(), model=model),
    )


def adapted_t5(spec: str) -> tuple[nn.Module, moepeft.Attachment]:
    model = build("t5")
    torch.manual_seed(1)
    return model, moepeft.attach(model, moepeft.method(spec, num_tasks=TASKS))


def curve(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@every_method
def test_seq2seq_loss_falls_and_auxiliary_losses_are_logged_by_name(spec: str, tmp_path: Path) -> None:
    model, adapters = adapted_t5(spec)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = {name: p.clone() for name, p in adapters.named_parameters()}
    trainer = translation_trainer(model, tmp_path)
    trainer.train()
    losses = curve(trainer, "loss")
    assert len(losses) == 6
    assert sum(losses[-2:]) < sum(losses[:2])
    for name in adapters.factory.capabilities.aux_losses:
        assert len(curve(trainer, f"aux_{name}")) == 6
        assert all(0 < value < loss for value, loss in zip(curve(trainer, f"aux_{name}"), losses, strict=True))
    logged = {key for entry in trainer.state.log_history for key in entry if key.startswith("aux_")}
    assert logged == {f"aux_{name}" for name in adapters.factory.capabilities.aux_losses}
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert any(not torch.equal(p, start[name]) for name, p in adapters.named_parameters())


@every_method
def test_resumed_run_equals_the_uninterrupted_one_bit_by_bit(spec: str, tmp_path: Path) -> None:
    """Dropout is on: the random state resumes as well. Checkpoints hold adapters and the head, no base weights."""
    whole, _ = adapted_classifier(spec)
    trainer = classification_trainer(whole, tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-3"
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {"adapter.safetensors", "trained.safetensors"}
    assert not list(checkpoint.glob("*model*"))
    heads = sum(p.numel() for p in whole.classifier.parameters())
    assert (checkpoint / "trained.safetensors").stat().st_size < 4 * heads + 400

    resumed, again = adapted_classifier(spec)
    for parameter in again.parameters():  # whatever it starts from, the checkpoint decides
        parameter.data.add_(1.0)
    classification_trainer(resumed, tmp_path / "again", max_steps=6).train(resume_from_checkpoint=str(checkpoint))
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())

    loaded = classifier()
    moepeft.load(loaded, tmp_path / "checkpoint-6")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    expected = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == expected


@every_method
def test_evaluation_and_prediction_route_by_the_rows_task(spec: str, tmp_path: Path) -> None:
    model, adapters = adapted_classifier(spec)
    trainer = classification_trainer(model, tmp_path, per_device_eval_batch_size=9)
    trainer.train()
    rows = trainer.eval_dataset
    predicted = trainer.predict(rows)
    batch = trainer.data_collator([{k: v for k, v in row.items() if k != "comment"} for row in rows])
    ids, labels = batch.pop("task_ids"), batch.pop("labels")
    with torch.no_grad():
        expected = model(**batch, task_ids=ids).logits
    assert torch.allclose(torch.tensor(predicted.predictions), expected, atol=1e-6)
    loss = nn.functional.cross_entropy(expected, labels)  # without auxiliary losses
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(loss), abs=1e-5)
    if adapters.factory.capabilities.routing == "task":
        with pytest.raises(MissingRouting, match="task_ids"):
            trainer.predict(rows.remove_columns("task_ids"))


@every_method
def test_predict_with_generate_routes(spec: str, tmp_path: Path) -> None:
    model, adapters = adapted_t5(spec)
    trainer = translation_trainer(
        model, tmp_path, predict_with_generate=True, generation_max_length=6, per_device_eval_batch_size=9
    )
    trainer.train()
    tokens = torch.tensor(trainer.predict(trainer.eval_dataset).predictions)
    rows = [{k: v for k, v in row.items() if k not in ("comment", "labels")} for row in trainer.eval_dataset]
    batch = DataCollatorWithPadding(ByT5Tokenizer())(rows)
    ids = batch.pop("task_ids")
    with adapters.route(task_ids=ids):
        expected = model.generate(**batch, max_length=6)
    assert torch.equal(tokens[:, : expected.shape[1]], expected)
    assert "eval_loss" in trainer.evaluate()


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """By a metric that falls from one evaluation to the next: the best is the first, whatever was learnt since."""
    model, _ = adapted_classifier("ept")
    trainer = classification_trainer(
        model,
        tmp_path,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_left",
        greater_is_better=True,
        learning_rate=0.1,
    )
    left = itertools.count(8, -1)
    trainer.compute_metrics = lambda _: {"left": next(left)}
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert best.endswith("checkpoint-2")
    fresh = classifier()
    moepeft.load(fresh, best)
    state = fresh.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    first, *_, last = curve(trainer, "eval_loss")
    assert first != pytest.approx(last, abs=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first, abs=1e-6)


class Recording(torch.optim.SGD):
    """Keeps the gradients of its only step."""

    def step(self, closure: Any = None) -> Any:
        self.seen = [None if p.grad is None else p.grad.clone() for g in self.param_groups for p in g["params"]]
        return super().step(closure)


def adapted_llama(spec: str) -> tuple[nn.Module, moepeft.Attachment]:
    model = build("llama")
    torch.manual_seed(1)
    return model, moepeft.attach(model, moepeft.method(spec, num_tasks=TASKS))


def language_trainer(model: nn.Module, folder: Path, **more: Any) -> AdapterTrainer:
    """Rows of very different lengths: a causal model's loss counts tokens, not batches."""
    rows = [
        {key: value[: 2 if index % 2 else 9] for key, value in row.items() if key in ("input_ids", "attention_mask")}
        | {"task_ids": row["task_ids"]}
        for index, row in enumerate(classified_rows())
    ]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    return AdapterTrainer(
        model=model,
        args=arguments(folder, **more),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(ByT5Tokenizer()),
    )


KINDS = {
    "classification": (adapted_classifier, classification_trainer),
    "translation": (adapted_t5, translation_trainer),
    "language": (adapted_llama, language_trainer),
}


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_have_the_gradient_of_the_whole_batch(kind: str, tmp_path: Path) -> None:
    """Task loss and auxiliary loss keep their weights when a batch of eight is split into two of four."""
    adapted, make = KINDS[kind]
    gradients, losses = [], []
    for accumulate in (1, 2):
        model, adapters = adapted("more")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "dropout", None), float):  # attention's own
                module.dropout = 0.0
        trainer = make(
            model,
            tmp_path,
            max_steps=1,
            max_grad_norm=0.0,
            logging_steps=1,
            per_device_train_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate,
        )
        trainer.optimizer = Recording(adapters.parameters(), lr=0.0)
        trainer.train()
        gradients.append(trainer.optimizer.optimizer.seen)
        losses.append((curve(trainer, "loss")[0], curve(trainer, "aux_contrastive")[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for one, two in zip(*gradients, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.allclose(one, two, atol=1e-6, rtol=1e-3)
    assert any(one is not None and one.any() for one in gradients[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_loss_is_the_sum_of_task_and_auxiliary_losses(kind: str, tmp_path: Path) -> None:
    """Beside a run that differs in nothing but the coefficient."""
    adapted, make = KINDS[kind]
    runs = []
    for coefficient in (0.1, 0.0):
        model, _ = adapted("ept")
        adapters = moepeft.attachment(model)
        adapters.detach()
        torch.manual_seed(1)
        adapters = moepeft.attach(model, moepeft.method("ept", num_tasks=TASKS, contrastive=coefficient), train=[])
        trainer = make(model, tmp_path, max_steps=1, logging_steps=1, max_grad_norm=0.0)
        trainer.optimizer = Recording(adapters.parameters(), lr=0.0)
        trainer.train()
        runs.append((trainer, dict(zip(adapters.state_dict(), trainer.optimizer.optimizer.seen, strict=False))))
    (with_loss, gradients), (without, others) = runs
    (auxiliary,) = curve(with_loss, "aux_contrastive")
    assert auxiliary > 0.01
    assert curve(with_loss, "loss")[0] - curve(without, "loss")[0] == pytest.approx(auxiliary, abs=1e-4)
    assert not curve(without, "aux_contrastive")
    assert any(
        gradient is not None and (others[name] is None or not torch.allclose(gradient, others[name]))
        for name, gradient in gradients.items()
    )


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    states = []
    for checkpointing in (False, True):
        model, adapters = adapted_t5("ept")
        trainer = translation_trainer(model, tmp_path, max_steps=3, gradient_checkpointing=checkpointing)
        trainer.train()
        states.append(adapters.state_dict())
    assert all(torch.allclose(value, states[1][name], atol=1e-6) for name, value in states[0].items())


def test_misuse_is_loud(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="carries no adapters: call attach"):
        classification_trainer(classifier(), tmp_path)
    model, _ = adapted_classifier("ept")
    trainer = classification_trainer(model, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    other, _ = adapted_classifier("lora")
    with pytest.raises(AdapterFileError, match="another method"):
        moepeft.attachment(other).restore(tmp_path / "saved")
    headless, _ = adapted_classifier("ept")
    headless.classifier.requires_grad_(False)
    before = {name: value.clone() for name, value in headless.state_dict().items()}
    with pytest.raises(AdapterFileError, match=r"attach\(train="):
        moepeft.attachment(headless).restore(tmp_path / "saved")
    (tmp_path / "saved" / "trained.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(AdapterFileError, match="not a whole safetensors file"):
        moepeft.load(headless, tmp_path / "saved")
    assert all(torch.equal(value, before[name]) for name, value in headless.state_dict().items())


def test_model_without_config_trains(tmp_path: Path) -> None:
    """Any module that returns a loss; rows as a plain list."""

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 1)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            y = self.inner(x).squeeze(-1)
            return {"logits": y} if labels is None else {"loss": (y - labels).square().mean(), "logits": y}

    model = Regression()
    moepeft.attach(model, moepeft.method("more", num_tasks=2))
    x = torch.randn(16, 4)
    rows = [{"x": row, "labels": float(row.sum()), "task_ids": index % 2} for index, row in enumerate(x)]
    trainer = AdapterTrainer(
        model=model, args=arguments(tmp_path, save_strategy="steps", save_steps=6), train_dataset=rows
    )
    trainer.train()
    assert curve(trainer, "loss")[-1] < curve(trainer, "loss")[0]
    moepeft.load(moepeft.attachment(model).detach(), tmp_path / "checkpoint-6")
