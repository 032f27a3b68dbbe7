"""Compile a host with adapters as one graph and compare: `python -m tests.support.compiles METHOD [definition]`.

Values and gradients, for rows and lengths that change. `masks` in place of `definition`: how many graphs models of
transformers need for batches of one shape. `cache`: decoding with static caches. A process of its own runs it: the
compiler cannot trace what checks the shapes in the tests' process.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, cast

import torch
from torch import nn
from transformers import StaticCache

import moepeft
from tests.support.hosts import HOSTS, batch, build, output

IDS = torch.arange(4)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(self.up_proj(x).relu())
        return result


def main(spec: str, *, fast: bool) -> None:
    torch.manual_seed(0)
    moepeft.fast_paths(fast)
    host = Chain()
    adapters = moepeft.attach(host, without_dropout(moepeft.method(spec, num_tasks=4)))
    host(torch.randn(4, 5, 16), task_ids=IDS)  # what looks at a first batch does so now
    for parameter in adapters.parameters():
        parameter.data.add_(0.1)
    parameters = list(adapters.parameters())
    compiled = torch.compile(host, backend="aot_eager", fullgraph=True)
    for rows, length in ((4, 5), (3, 17), (2, 9)):
        x = torch.randn(rows, length, 16)
        with adapters.route(task_ids=IDS[:rows]):
            expected, found = host(x), compiled(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        both = [torch.autograd.grad(y.square().sum(), parameters, allow_unused=True) for y in (expected, found)]
        for parameter, one, other in zip(parameters, *both, strict=True):
            zero = torch.zeros_like(parameter)  # what no path reaches has none in eager mode, and zeros in a graph
            pair = [zero if gradient is None else gradient for gradient in (one, other)]
            assert torch.allclose(*pair, rtol=1e-3, atol=1e-3)


def count_graphs(spec: str) -> None:
    """Every batch brings a mask of its own, and a graph of the second one serves all that follow."""
    for name in HOSTS:
        torch._dynamo.reset()
        host = build(name).train()
        adapters = moepeft.attach(host, moepeft.method(spec, num_tasks=4))
        graphs = []

        def counted(graph: torch.fx.GraphModule, inputs: object, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        compiled, made = torch.compile(host, backend=counted), []
        for seed in range(5):
            y = output(compiled, batch(host, padded=3, seed=seed), task_ids=IDS.roll(seed))
            (y.square().mean() + adapters.aux_loss()).backward()
            adapters.after_step()
            made.append(len(graphs))
        assert made[1] == made[-1], f"{spec} on {name}: {made} graphs after each batch"


def decode(spec: str) -> None:
    """Two texts in turn, each with a static cache that a GPU would count in: without a graph break, TuckA apart.

    TuckA keeps the prompt's routing with the cache, and has to ask whether there was a prompt.
    """
    host = build("llama")
    adapters = moepeft.attach(host, without_dropout(moepeft.method(spec, num_tasks=4)))
    for parameter in host.parameters():  # a tiny model's layers hardly change what they are given
        parameter.data.mul_(3.0)
    for parameter in adapters.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    host(torch.tensor([[3, 4, 5]]), task_ids=1)
    compiled = torch.compile(host, backend="eager", fullgraph=spec != "tucka")
    texts = batch(host, rows=2, length=5)["input_ids"]
    found, expected = (_decoded(model, texts) for model in (compiled, host))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def _decoded(model: Any, texts: torch.Tensor) -> torch.Tensor:
    caches = [StaticCache(config=model.config, max_cache_len=16) for _ in texts]
    logits = []
    for step in range(4):
        for task, (text, cache) in enumerate(zip(texts, caches, strict=True)):
            given = text[None] if step == 0 else logits[-len(texts)].argmax(-1, keepdim=True)
            places = torch.arange(len(text))[None] if step == 0 else torch.tensor([[len(text) + step - 1]])
            call = {
                "position_ids": places,
                "past_key_values": cache,
                "use_cache": True,
                "task_ids": torch.tensor([task]),
            }
            logits.append(model(given, **call).logits[:, -1])
    return torch.cat(logits)


def without_dropout(factory: moepeft.AdapterFactory) -> moepeft.AdapterFactory:
    """Random draws of two runs cannot be compared."""
    fields = {field.name for field in dataclasses.fields(cast(Any, factory))}
    return dataclasses.replace(cast(Any, factory), dropout=0.0) if "dropout" in fields else factory


if __name__ == "__main__":
    if "masks" in sys.argv[2:]:
        count_graphs(sys.argv[1])
    elif "cache" in sys.argv[2:]:
        decode(sys.argv[1])
    else:
        main(sys.argv[1], fast="definition" not in sys.argv[2:])
