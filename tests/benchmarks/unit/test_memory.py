"""Peak memory, beside what torch's profiler saw the processor's allocator do."""

import json
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertModel

import moepeft
from benchmarks.instruments.memory import held, peak_above
from moepeft.runtime import Forward

CPU = torch.device("cpu")


def allocator_peak(step, folder):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    profiled.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = [event["args"]["Bytes"] for event in events if event["name"] == "[memory]"]
    return max(accumulate(changes))


@pytest.mark.parametrize("method", ["lora", "moelora", "more", "mixlora", "tucka", "ept"])
def test_what_the_allocator_gave_out(method, monkeypatch, tmp_path):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(**sizes, vocab_size=50, max_position_embeddings=32))
    tasks = {"num_tasks": 3} if method in ("moelora", "more", "ept") else {}
    adapters = moepeft.attach(model, moepeft.method(method, **tasks))
    model.train()
    inputs = {"input_ids": torch.arange(6 * 17).view(6, 17) % 50}
    if tasks:
        inputs["task_ids"] = torch.tensor([0, 1, 2, 0, 1, 2])

    def step():
        (model(**inputs).last_hidden_state.square().mean() + adapters.aux_loss()).backward()

    def fresh():
        # Neither sees memory go that came before: what the last forward left is such.
        adapters.runtime.begin(Forward())
        adapters.runtime.end()
        for parameter in model.parameters():
            parameter.grad = None

    step()
    fresh()
    found = peak_above(step, CPU)
    fresh()
    # A reduction takes a few bytes to work in.
    assert 0 <= allocator_peak(step, tmp_path) - found < 1000


def test_what_was_there_before_does_not_count():
    there = torch.zeros(1000)

    def step():
        there.view(10, 100).add_(1)
        return (there[:10] + 1).sum()

    assert peak_above(step, CPU) == 10 * 4 + 4


def test_views_are_held_once():
    whole = torch.zeros(100, dtype=torch.float64)
    assert held([whole, whole[:10], torch.zeros(3)], CPU) == 800 + 12
