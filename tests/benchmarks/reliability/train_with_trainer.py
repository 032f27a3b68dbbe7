"""Train a tiny BERT with AdapterTrainer: ``train_with_trainer.py FOLDER ROWS_PER_PROCESS``. A test launches it."""

from __future__ import annotations

import sys

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import moepeft
from moepeft.bridges.trainer import AdapterTrainer


def main(folder: str, rows_per_process: int) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    adapters = moepeft.attach(model, moepeft.method("mixlora", balance_coefficient=0.5), train=[])
    adapters.synchronise()
    ids = torch.randint(3, 64, (16, 7))
    rows = [{"input_ids": row, "labels": index % 2, "task_ids": 0} for index, row in enumerate(ids)]
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=rows_per_process,
        max_steps=4,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    trainer = AdapterTrainer(model=model, args=arguments, train_dataset=rows)
    assert trainer.args.world_size * rows_per_process == 4
    if trainer.args.process_index == 0:
        adapters.save("start")
    trainer.train()
    trainer.save_model(folder)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
