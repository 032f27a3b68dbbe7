"""One T5, three tasks in every batch, one set of adapters: train with the Seq2SeqTrainer, generate for one task."""

import argparse
from itertools import permutations

import transformers as hf
from datasets import Dataset

import moepeft
from moepeft.bridges.trainer import AdapterSeq2SeqTrainer

T5 = hf.T5ForConditionalGeneration
TASKS = {"copy": str, "upper": str.upper, "reverse": lambda word: word[::-1]}
TINY = {"vocab_size": 384, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}


def main() -> None:
    """Train on words of five letters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="hub id or folder of a T5; a tiny random one if not given")
    name = parser.parse_args().model
    model = T5.from_pretrained(name) if name else T5(hf.T5Config(**TINY, decoder_start_token_id=0))
    tokenizer = hf.AutoTokenizer.from_pretrained(name) if name else hf.ByT5Tokenizer()
    rows = [
        {**tokenizer(word), "labels": tokenizer(change(word))["input_ids"], "task_ids": task}
        for word in map("".join, permutations("abcde"))
        for task, change in enumerate(TASKS.values())
    ]
    adapters = moepeft.attach(model, moepeft.method("ept", num_tasks=len(TASKS)))
    settings = hf.Seq2SeqTrainingArguments("t5-adapters", max_steps=20, learning_rate=3e-3)
    trainer = AdapterSeq2SeqTrainer(model, settings, hf.DataCollatorForSeq2Seq(tokenizer), Dataset.from_list(rows))
    trainer.train()
    with adapters.route(task_ids=list(TASKS).index("upper")):
        tokens = model.generate(**tokenizer("abc", return_tensors="pt").to(model.device), max_new_tokens=8)
    print(tokenizer.batch_decode(tokens))  # noqa: T201


if __name__ == "__main__":
    main()
