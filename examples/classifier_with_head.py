"""A classifier whose head is new: trained beside the adapters, saved with them, used by a fresh process."""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

import moepeft

BASE, ADAPTERS = "base", "sentiment"  # any pretrained encoder, by folder or hub id; where the adapters go
IDS = torch.randint(5, 100, (64, 8), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": (IDS[:, 0] > 50).long(), "task_ids": torch.arange(64) % 2}


def train() -> None:
    """A new head, two tasks."""
    model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2)
    adapters = moepeft.attach(model, moepeft.EPT(rank=4, num_tasks=2, kernels=(2, 2, 4, 4)), train=["classifier"])
    optimiser = torch.optim.AdamW(adapters.parameter_groups(heads={"lr": 1e-2}), lr=3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        (model(**BATCH).loss + adapters.aux_loss()).backward()
        optimiser.step()
    adapters.save(ADAPTERS)


if __name__ == "__main__":
    if "--predict" not in sys.argv:
        if not Path(BASE).exists():
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            BertModel(BertConfig(**sizes, vocab_size=100)).save_pretrained(BASE)
        train()
        subprocess.run([sys.executable, __file__, "--predict"], check=True)  # noqa: S603
    else:
        served = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2)
        moepeft.load(served, ADAPTERS)  # the head as well
        right = served.eval()(**BATCH).logits.argmax(-1) == BATCH["labels"]
        print(f"accuracy {right.float().mean():.3f}")  # noqa: T201
