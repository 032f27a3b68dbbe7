"""What a method declares holds for random configurations on random networks: saving, merging, independence of rows."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor, nn

import moepeft
from moepeft.errors import NotMergeable
from tests.library.property.configurations import TASKS, attach_or_draw_again, cases, network

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@torch.no_grad()
def run(model: nn.Module, x: Tensor, mask: Tensor, tasks: Tensor) -> Tensor:
    result: Tensor = model.eval()(x, attention_mask=mask, task_ids=tasks)
    return result


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Trained:
    """A network whose adapters have made a step, and inputs for it."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.bare = network(case)
        self.model = copy.deepcopy(self.bare)
        self.adapters = attach_or_draw_again(self.model, case["config"])
        rows, length = case["rows"], case["length"]
        real = torch.randint(1, length + 1, (rows, 1)) if case["masked"] else torch.full((rows, 1), length)
        self.mask = (torch.arange(length) < real).long()
        self.x = torch.randn(rows, length, case["width"])
        self.tasks = torch.randint(0, TASKS, (rows,))
        for _ in range(2):  # a factor that starts at zero lets gradients through from the second step on
            optimiser = torch.optim.SGD(self.adapters.parameters(), lr=0.1)
            output = self.model.train()(self.x, attention_mask=self.mask, task_ids=self.tasks)
            (output.square().mean() + self.adapters.aux_loss()).backward()
            nn.utils.clip_grad_norm_(self.adapters.parameters(), 10.0)
            optimiser.step()
            self.adapters.after_step()
            optimiser.zero_grad()
        self.output = run(self.model, self.x, self.mask, self.tasks)

    def saves_and_loads(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.adapters.save(folder)
            fresh = copy.deepcopy(self.bare)
            again = moepeft.load(fresh, folder)
        assert again.factory == self.adapters.factory
        run(fresh, torch.randn_like(self.x), self.mask, self.tasks)  # what is drawn from a first batch must not be
        assert torch.equal(run(fresh, self.x, self.mask, self.tasks), self.output)

    def merges_or_refuses(self) -> None:
        capabilities = self.adapters.factory.capabilities
        if capabilities.not_mergeable:
            with pytest.raises(NotMergeable):
                self.adapters.merge(task=0 if capabilities.routing == "task" else None)
            return
        for task in range(TASKS) if capabilities.routing == "task" else [None]:
            ids = torch.full_like(self.tasks, task or 0)
            expected = run(self.model, self.x, self.mask, ids)
            self.adapters.merge(task=task)
            torch.testing.assert_close(run(self.model, self.x, self.mask, ids), expected, **TOLERANCE)
            self.adapters.unmerge()
        assert torch.equal(run(self.model, self.x, self.mask, self.tasks), self.output)

    def rows_stand_alone_where_declared(self) -> None:
        if not self.adapters.factory.capabilities.row_independent:
            return
        real = self.mask.bool()
        backwards = run(self.model, self.x.flip(0), self.mask.flip(0), self.tasks.flip(0)).flip(0)
        torch.testing.assert_close(backwards, self.output, **TOLERANCE)
        alone = run(self.model, self.x[:1], self.mask[:1], self.tasks[:1])
        torch.testing.assert_close(alone, self.output[:1], **TOLERANCE)
        if self.adapters.factory.capabilities.padding_independent:
            noisy = torch.where(real.unsqueeze(-1), self.x, torch.randn_like(self.x))
            longer = nn.functional.pad(noisy, (0, 0, 0, 2), value=3.0)
            found = run(self.model, longer, nn.functional.pad(self.mask, (0, 2)), self.tasks)[:, : self.x.shape[1]]
            torch.testing.assert_close(found[real], self.output[real], **TOLERANCE)

    def leaves_the_bare_network(self) -> None:
        self.adapters.detach()
        state = self.bare.state_dict()
        assert list(self.model.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in self.model.state_dict().items())
        assert torch.equal(self.model(self.x), self.bare(self.x))


@pytest.mark.slow
@pytest.mark.parametrize("name", moepeft.available())
def test_random_configurations_keep_their_promises(name: str) -> None:
    moved = []

    @settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(name))
    def check(case: dict[str, Any]) -> None:
        assume(case["config"].capabilities.batch_first)
        trained = Trained(case)
        moved.append(not torch.equal(trained.output, trained.bare(trained.x)))
        trained.saves_and_loads()
        trained.merges_or_refuses()
        trained.rows_stand_alone_where_declared()
        trained.leaves_the_bare_network()

    check()
    assert sum(moved) > 0.7 * len(moved)  # the adapters did something in what was compared
