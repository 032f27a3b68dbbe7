"""TRL's SFTTrainer on two tasks at once, then one LoRA folder per task for a server of many LoRAs."""

import argparse

import datasets
import torch
import transformers as hf
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import moepeft
from moepeft.bridges.peft_checkpoints import export_all_tasks
from moepeft.bridges.trainer import AdapterTrainerMixin, KeepTaskIds

TEXTS = {"reverse": "{0} {1} -> {1} {0}", "repeat": "{0} {1} -> {0} {1}"}  # the second task contradicts the first
Trainer = type("Trainer", (AdapterTrainerMixin, SFTTrainer), {})  # SFTTrainer for models that carry adapters


def main() -> None:
    """Train, then export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    tokenizer, steps = hf.ByT5Tokenizer(), parser.parse_args().steps
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=len(tokenizer)))  # or from_pretrained(...)
    adapters = moepeft.attach(model, moepeft.MOELoRA(rank=8, num_experts=4, num_tasks=2))
    words = torch.randint(97, 123, (64, 2)).tolist()
    texts = [(text.format(*map(chr, pair)), task) for pair in words for task, text in enumerate(TEXTS.values())]
    rows = [{"text": text, "task_ids": task} for text, task in texts]
    settings = SFTConfig("sft", max_steps=steps, learning_rate=1e-2, report_to=[], bf16=False)
    collator = KeepTaskIds(DataCollatorForLanguageModeling(tokenizer.pad_token_id))
    Trainer(model, settings, collator, datasets.Dataset.from_list(rows), processing_class=tokenizer).train()
    for export in export_all_tasks(adapters, "loras", names=list(TEXTS)):
        print(f"{export.folder}: rank {max(export.ranks.values())}, error {export.worst[1]:.1e}")  # noqa: T201


if __name__ == "__main__":
    main()
