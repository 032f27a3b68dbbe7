"""A process of its own that finds a base and adapters with a head in a folder: predicts, then trains on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, TrainingArguments

import moepeft
from moepeft.bridges.trainer import AdapterTrainer

TASKS = 2


def rows() -> list[dict[str, Any]]:
    ids = torch.randint(3, 20, (8, 6), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": row, "labels": index % 2, "task_ids": index % TASKS} for index, row in enumerate(ids)]


def batch() -> dict[str, Tensor]:
    found = rows()
    columns = {name: [row[name] for row in found] for name in ("labels", "task_ids")}
    return {
        "input_ids": torch.stack([row["input_ids"] for row in found]),
        **{k: torch.tensor(v) for k, v in columns.items()},
    }


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    model.eval()
    found: Tensor = model(**batch()).logits
    return found


def train(adapters: moepeft.Attachment, optimiser: torch.optim.Optimizer, steps: int) -> None:
    adapters.model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        (adapters.model(**batch()).loss + adapters.aux_loss()).backward()
        optimiser.step()


def trainer(model: nn.Module, folder: Path, steps: int) -> AdapterTrainer:
    settings = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return AdapterTrainer(model, settings, train_dataset=rows())


def main(folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    model = BertForSequenceClassification.from_pretrained(folder / "base")
    saved = folder / "run" / "checkpoint-2" if kind == "trainer" else folder / "run"
    adapters = moepeft.load(model, saved)
    predicted = logits(model)
    if kind == "trainer":
        trainer(model, folder / "run", 4).train(resume_from_checkpoint=str(saved))
    else:
        optimiser = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
        optimiser.load_state_dict(torch.load(folder / "optimiser.pt"))
        train(adapters, optimiser, 2)
    save_file({"predicted": predicted, "resumed": logits(model)}, folder / "found.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
