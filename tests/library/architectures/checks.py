"""What every method must do on an architecture: each clause compares the adapted model with itself or the bare one.

A clause is asked only where the bare architecture has the property itself: some answer otherwise when a row stands
alone, some read their padding, some answer otherwise with a cache. `Bare` finds out.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import moepeft
from moepeft.errors import MoepeftError, NotMergeable

from . import hosts, inputs
from .bare import Bare, alone, call, close, generate, run

TASKS = 3
IDS = torch.tensor([2, 0, 1])
VISIBLE = 1e-3  # the least difference that another task must make: far above rounding


class Wrong(Exception):
    """A clause does not hold: the model would be silently wrong."""


class Cell:
    """One method on one architecture, attached with default sites and moved away from its start."""

    def __init__(self, bare: Bare, method: str) -> None:
        self.bare, self.batch = bare, bare.batch
        self.model = copy.deepcopy(bare.model)
        torch.manual_seed(5)
        self.adapters = moepeft.attach(self.model, moepeft.method(method, num_tasks=TASKS))
        self.promises = self.adapters.factory.capabilities
        run(self.model, self.batch, task_ids=IDS)  # a data-aware start happens now, not between two comparisons
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.adapters.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        self.output = run(self.model, self.batch, task_ids=IDS)

    # ------------------------------------------------------------------ the clauses

    def adapters_act(self) -> None:
        """The output is another than the bare model's, and another task's where the method routes by task."""
        if not _differs(self.output, self.bare.output):
            raise Wrong("the adapters change nothing")
        if self.promises.routing == "task" and not _differs(
            self.output, run(self.model, self.batch, task_ids=IDS.flip(0))
        ):
            raise Wrong("another task changes nothing")

    def rows_stand_alone(self) -> None:
        """A mixed batch equals its rows alone; where rows depend on the batch, its order changes nothing."""
        if self.promises.row_independent:
            other, what = alone(self.model, self.batch, IDS), "alone"
        else:
            backwards = inputs.of_rows(self.batch, [2, 1, 0])
            found = run(self.model, backwards, task_ids=IDS.flip(0))
            other = [
                value.unflatten(0, (inputs.ROWS, -1)).flip(0).flatten(0, 1) if index in self.bare.rows else value
                for index, value in enumerate(found)
            ]
            what = "in another order"
        for index in self.bare.rows:
            _agree(self.output[index], other[index], f"rows {what} give another output")

    def padding_changes_nothing(self) -> None:
        """Neither the outputs where the bare model's stay, nor the auxiliary losses."""
        if not (self.bare.stable and self.promises.padding_independent):
            return
        padded = inputs.other_padding(self.bare.kind, self.batch)
        other = run(self.model, padded, task_ids=IDS)
        for before, after, stable in zip(self.output, other, self.bare.stable, strict=True):
            _agree(before[stable], after[stable], "the values of padding change the output")
        for name, loss in self._losses(self.batch).items():
            _agree(loss, self._losses(padded)[name], f"the values of padding change the loss {name!r}")

    def _losses(self, batch: inputs.Inputs) -> dict[str, Tensor]:
        with _training(self.model):
            call(self.model, batch, task_ids=IDS)
            return {name: value.detach() for name, value in self.adapters.aux_losses().items()}

    def no_parameter_is_dead(self) -> None:
        """A gradient reaches every parameter that the method says can train, at every site."""
        host = hosts.HOSTS[self.bare.name]
        for seed in (1, 2):
            batch = inputs.draw(host.kind, host.shape, seed)
            with _training(self.model):
                found = [
                    value for value in inputs.tensors(call(self.model, batch, task_ids=IDS)) if value.requires_grad
                ]
                total = sum((value.square().mean() for value in found), torch.zeros(()))
                (total + self.adapters.aux_loss()).backward()
        never = self.promises.never_trained
        named = {n: p for n, p in self.adapters.named_parameters() if not n.endswith(never or ("-",))}
        dead = [name for name, parameter in named.items() if parameter.grad is None]
        if dead:
            raise Wrong(f"no gradient in {len(dead)} of {len(named)} parameters, e.g. {dead[0]}")
        still = [
            site.name
            for site in self.adapters.sites
            if not any(p.grad.any() for n, p in named.items() if n.startswith(f"sites.{site.name}."))
            and any(n.startswith(f"sites.{site.name}.") for n in named)
        ]
        if still:
            raise Wrong(f"no gradient but zero at {len(still)} of {len(self.adapters.sites)} sites, e.g. {still[0]}")
        self.adapters.model.zero_grad(set_to_none=True)

    def cached_generation_agrees(self) -> None:
        """Greedy steps with a cache equal those without."""
        if not self.bare.generates:
            return
        with self.adapters.route(task_ids=IDS):
            cached = generate(self.model, self.bare.kind, self.batch, cached=True)
            if self.bare.cached and self.promises.cache_consistent:
                _agree(cached, generate(self.model, self.bare.kind, self.batch, cached=False), "a cache changes logits")

    def merging_equals_routing(self) -> None:
        """And unmerging gives back every bit."""
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        for task in (1,) if self.promises.routing == "task" else (None,):
            wanted = run(self.model, self.batch, task_ids=torch.full((inputs.ROWS,), task or 0))
            try:
                self.adapters.merge(task=task)
            except NotMergeable:
                if self.promises.not_mergeable is None:
                    raise
                return
            _all_agree(run(self.model, self.batch), wanted, "merging changes the output")
            self.adapters.unmerge()
        after = self.model.state_dict()
        if list(after) != list(before) or not all(torch.equal(after[name], value) for name, value in before.items()):
            raise Wrong("unmerging does not give every bit back")

    def saving_and_loading_agree(self) -> None:
        """Bit for bit, in the first forward."""
        fresh = copy.deepcopy(self.bare.model)
        with tempfile.TemporaryDirectory() as folder:
            self.adapters.save(folder)
            moepeft.load(fresh, folder)
        if not _equal(run(fresh, self.batch, task_ids=IDS), run(self.model, self.batch, task_ids=IDS)):
            raise Wrong("the loaded adapters give another output")

    def detaching_leaves_the_bare_model(self) -> None:
        """Bit for bit, as `disabled` does."""
        with self.adapters.disabled():
            if not _equal(run(self.model, self.batch, task_ids=IDS), self.bare.output):
                raise Wrong("the disabled model is not the bare one")
        self.adapters.detach()
        state, wanted = self.model.state_dict(), self.bare.model.state_dict()
        if list(state) != list(wanted) or not all(torch.equal(state[name], value) for name, value in wanted.items()):
            raise Wrong("the detached model holds something else than the bare one")
        if not _equal(run(self.model, self.batch), self.bare.output):
            raise Wrong("the detached model gives another output than the bare one")


CLAUSES = (
    Cell.adapters_act,
    Cell.rows_stand_alone,
    Cell.padding_changes_nothing,
    Cell.no_parameter_is_dead,
    Cell.cached_generation_agrees,
    Cell.saving_and_loading_agree,
    Cell.merging_equals_routing,
    Cell.detaching_leaves_the_bare_model,
)


def outcome(bare: Bare, method: str) -> str:
    """``ok``, the words of a refusal, ``ok; `` and the words of a refusal to merge, or ``WRONG: `` and what is."""
    notes = []
    try:
        cell = Cell(bare, method)
        for clause in CLAUSES:
            try:
                clause(cell)
            except NotMergeable as refusal:
                notes.append(f"merge() refuses: {refusal}")
    except MoepeftError as refusal:
        return str(refusal)
    except Wrong as wrong:
        return f"WRONG: {wrong}"
    except Exception as error:  # whatever an architecture may raise: it does without adapters
        line = " ".join(str(error).split())
        return f"WRONG: {type(error).__name__}: {line[:160]}"
    return "; ".join(["ok", *notes])


def outcomes(name: str, methods: Sequence[str] | None = None) -> tuple[str, dict[str, str]]:
    """The clauses that an architecture is asked, and the outcome of these methods or of all."""
    bare = Bare.of(name)
    return bare.clauses, {method: outcome(bare, method) for method in methods or moepeft.available()}


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    model.train()
    try:
        yield
    finally:
        model.eval()


def _agree(one: Tensor, other: Tensor, otherwise: str) -> None:
    if not close(one, other):
        gap = f" by {(one - other).abs().max():.1g}" if one.shape == other.shape else ""
        raise Wrong(f"{otherwise}{gap}")


def _all_agree(one: list[Tensor], other: list[Tensor], otherwise: str) -> None:
    for a, b in zip(one, other, strict=True):
        _agree(a, b, otherwise)


def _differs(one: list[Tensor], other: list[Tensor]) -> bool:
    return any(float((a - b).abs().max()) > VISIBLE for a, b in zip(one, other, strict=True))


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))
