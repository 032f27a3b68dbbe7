"""One adapted model that two threads serve: each answer is what the model gives to a single thread."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor, nn

import moepeft

T = TypeVar("T")
ANSWERS, TASKS = 1000, 3  # of both threads together, for every method


class Request(NamedTuple):
    """What one caller wants: rows of tokens, and how the tasks are said."""

    inputs: dict[str, Tensor]
    task_ids: list[int]
    how: str  # in the "call", by a "route", or by an "inner" route that another one surrounds; or "disabled"


def requests(rows: int, length: int, seed: int) -> list[Request]:
    """Requests of one thread; its rows, lengths, padding and tasks are unlike the other's."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, how in enumerate(("call", "route", "inner", "disabled", "call")):
        ids = torch.randint(3, 40, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[number % rows, length - 1 - number % 2 :] = 0
        tasks = torch.randint(0, TASKS, (rows,), generator=generator).tolist()
        found.append(Request({"input_ids": ids, "attention_mask": mask}, tasks, how))
    return found


CALLERS = (requests(rows=2, length=5, seed=1), requests(rows=3, length=4, seed=2))


class Host(nn.Module):
    """One feed-forward network, so that a thousand answers take a second."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(8, 16), "down_proj": nn.Linear(16, 8)})])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x: Tensor = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer["down_proj"](layer["up_proj"](x).relu())
        return x * attention_mask.unsqueeze(-1)


def adapted(spec: str) -> moepeft.Attachment:
    torch.manual_seed(0)
    without_chance = {"dropout": 0.0} if hasattr(moepeft.method(spec, num_tasks=TASKS), "dropout") else {}
    return moepeft.attach(Host().eval(), moepeft.method(spec, num_tasks=TASKS, **without_chance))


def moved(adapters: moepeft.Attachment) -> moepeft.Attachment:
    """The adapters away from their start, so that each task has an answer of its own."""
    answer(adapters, CALLERS[0][0])
    for parameter in adapters.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return adapters


def answer(adapters: moepeft.Attachment, wanted: Request) -> Tensor:
    with ExitStack() as stack:
        given: dict[str, list[int]] = {}
        if wanted.how == "call":
            given["task_ids"] = wanted.task_ids
        elif wanted.how == "disabled":
            stack.enter_context(adapters.disabled())
        else:
            if wanted.how == "inner":
                stack.enter_context(adapters.route(task_ids=0))
            stack.enter_context(adapters.route(task_ids=wanted.task_ids))
        output: Tensor = adapters.model(**wanted.inputs, **given)
    return output


def step(adapters: moepeft.Attachment, wanted: Request) -> list[Tensor]:
    """A training step's auxiliary losses and gradients."""
    output, losses = answer(adapters, wanted), adapters.aux_losses()
    total = output.square().mean() + sum(losses.values(), torch.zeros(()))
    gradients = torch.autograd.grad(total, list(adapters.parameters()), allow_unused=True)
    return [output.detach(), *(loss.detach() for loss in losses.values()), *(g for g in gradients if g is not None)]


def serve(first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
    """What both give, each in a thread of its own, begun together."""
    together = threading.Barrier(2, timeout=60)

    def begin(work: Callable[[], T]) -> T:
        together.wait()
        return work()

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(begin, work) for work in (first, second)]
        return running[0].result(timeout=300), running[1].result(timeout=300)


def count_wrong(ask: Callable[[Request], Sequence[Tensor]], callers: Sequence[list[Request]], times: int) -> int:
    """How many of each thread's `times` answers differ by a bit from those of a single thread."""
    expected = [[ask(request) for request in requests] for requests in callers]

    def count(caller: int) -> int:
        wrong = 0
        for number in range(times):
            turn = number % len(callers[caller])
            given, right = ask(callers[caller][turn]), expected[caller][turn]
            wrong += not all(torch.equal(a, b) for a, b in zip(given, right, strict=True))
        return wrong

    return sum(serve(functools.partial(count, 0), functools.partial(count, 1)))


@pytest.fixture(autouse=True)
def _threads_change_often(one_thread: None) -> Iterator[None]:
    """So that threads meet inside of layers, not at the ends of forwards."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.slow
@pytest.mark.parametrize("spec", moepeft.available())
def test_no_answer_in_a_thousand_is_wrong(spec: str) -> None:
    adapters = moved(adapted(spec))
    with torch.no_grad():
        answers = [answer(adapters, request) for requests in CALLERS for request in requests]
    assert not torch.equal(answers[0], answers[3])  # adapters change what the bare model says

    def ask(request: Request) -> list[Tensor]:
        with torch.no_grad():
            return [answer(adapters, request)]

    assert count_wrong(ask, CALLERS, ANSWERS // 2) == 0


@pytest.mark.slow
@pytest.mark.parametrize("spec", moepeft.available())
def test_losses_and_gradients_are_the_callers_own(spec: str) -> None:
    adapters = moved(adapted(spec))
    adapters.model.train()
    callers = [[request for request in requests if request.how != "disabled"] for requests in CALLERS]
    assert count_wrong(lambda request: step(adapters, request), callers, 12) == 0


@pytest.mark.parametrize("spec", ["tucka", "more@released"])
def test_what_the_first_forward_decides_is_decided_once(spec: str) -> None:
    """The first answers of both threads are those that the model gives ever after."""
    for _ in range(40):
        adapters = adapted(spec)
        for parameter in adapters.parameters():
            parameter.data.normal_()
        one, other = (functools.partial(answer, adapters, requests[0]) for requests in CALLERS)
        first = serve(one, other)
        assert torch.equal(first[0], one())
        assert torch.equal(first[1], other())
