"""Adapters on a LLaMA whose frozen weights are stored in 4 bit: attach, train, save, merge."""

import argparse
import importlib.util

import torch
import transformers as hf

import moepeft

TINY = hf.LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


def main() -> None:
    """Train on random tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="hub id or folder of a LLaMA; a tiny random one if not given")
    name = parser.parse_args().model
    if not (quantised := bool(importlib.util.find_spec("bitsandbytes"))):
        print("the base stays unquantised: pip install bitsandbytes for 4 bit")  # noqa: T201
    four_bit = hf.BitsAndBytesConfig(load_in_4bit=True) if quantised else None
    hf.LlamaForCausalLM(TINY).save_pretrained("tiny-llama")
    model = hf.AutoModelForCausalLM.from_pretrained(name or "tiny-llama", quantization_config=four_bit).train()
    adapters = moepeft.attach(model, moepeft.method("more", num_tasks=2))
    optimiser = torch.optim.AdamW(adapters.parameters())
    tokens = torch.randint(99, (4, 12), device=model.device)
    for _ in range(10):
        (model(tokens, labels=tokens, task_ids=[0, 1, 0, 1]).loss + adapters.aux_loss()).backward()
        optimiser.step()
        optimiser.zero_grad()
    adapters.save("llama-adapters")
    adapters.merge(task=0)  # quantises again: a warning says what the rounding loses


if __name__ == "__main__":
    main()
