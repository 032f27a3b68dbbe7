"""The contract: what a method must do on a host, or declare that it does not.

Every clause holds a promise both ways: what is declared must hold, and what is declared not to hold must be seen to
fail. Values are compared in double precision.
"""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from moepeft.attach import Attachment, attach, attachment
from moepeft.config import task_number
from moepeft.errors import ContractError, MissingRouting, NotMergeable
from moepeft.fast import fast_paths
from moepeft.loading import load
from moepeft.protocols import AdapterFactory

from .hosts import ROWS, Host, Inputs

IDS = torch.arange(ROWS)
TOLERANCE = 1e-9

Clause = Callable[[AdapterFactory, Host], None]


def adapted(factory: AdapterFactory, host: Host, *, moved: bool = True) -> Attachment:
    """The host with adapters, in double precision; `moved` takes every parameter away from its start."""
    model = host.build()
    torch.manual_seed(5)
    adapters = attach(model, factory)
    model.double()
    if moved:
        run(adapters, host, host.inputs(1, 0))  # a start that looks at the first batch is made now
        generator = torch.Generator().manual_seed(7)
        for parameter in adapters.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_((0.1 * noise).to(parameter))
    return adapters


@torch.no_grad()
def run(adapters: Attachment, host: Host, inputs: Inputs, ids: Tensor | None = IDS) -> Tensor:
    """The adapted model's output."""
    torch.manual_seed(6)
    return host.output(adapters.model(**inputs, **({} if ids is None else {"task_ids": ids})))


def train(adapters: Attachment, host: Host, inputs: Inputs) -> Tensor:
    """Loss of a training step, auxiliary losses included; leaves gradients behind."""
    torch.manual_seed(6)
    adapters.model.train()
    loss = host.output(adapters.model(**inputs, task_ids=IDS)).square().mean() + adapters.aux_loss()
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    adapters.model.eval()
    return loss


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ContractError(message)


def _hold(declared: bool, holds: bool, field: str, what: str) -> None:
    """A promise of `Capabilities`, both ways."""
    says = "promises it" if declared else "denies it"
    _require(holds == declared, f"{what}, but Capabilities({field}={declared}) {says}: mend the method, or declare it")


def _near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=TOLERANCE)


def count_is_the_closed_form(factory: AdapterFactory, host: Host) -> None:
    """`count(sites)` is the number of trainable parameters, with memory and without."""
    count = adapted(factory, host, moved=False).parameter_count()
    _require(
        count.total == count.closed_form,
        f"count(sites) gives {count.closed_form:,}, the adapters hold {count.total:,} trainable numbers on "
        f"{count.sites} sites: mend the formula, or what `build` and `shared` make",
    )
    with torch.device("meta"):
        model = host.build()
        total = attach(model, factory).parameter_count().total
    _require(total == count.total, f"on the meta device the adapters hold {total:,} numbers, wanted {count.total:,}")


def identity_at_the_start(factory: AdapterFactory, host: Host) -> None:
    """A freshly attached model computes what the bare model computes."""
    adapters = adapted(factory, host, moved=False)
    inputs = host.inputs(1, 0)
    got = run(adapters, host, inputs)
    with adapters.disabled():
        expected = run(adapters, host, inputs)
    off = float((got - expected).abs().max())
    said = f"a freshly attached model differs from the bare one by {off:.2g}"
    _hold(factory.capabilities.identity_at_init, off < TOLERANCE, "identity_at_init", said)


def bare_model_is_untouched(factory: AdapterFactory, host: Host) -> None:
    """`disabled` and `detach` give the bare model back to the bit; only adapters train."""
    bare, inputs = host.build().double(), host.inputs(1, 2)
    with torch.no_grad():
        expected = host.output(bare(**inputs))
    adapters = adapted(factory, host)
    frozen = [name for name, p in adapters.model.named_parameters() if p.requires_grad and "moepeft" not in name]
    _require(not frozen, f"the base model's parameter {frozen[:1]} trains: an adapter must not hold the frozen layer")
    with adapters.disabled():
        _require(torch.equal(run(adapters, host, inputs), expected), "disabled() does not compute the bare model")
    _require(not torch.equal(run(adapters, host, inputs), expected), "the adapters, moved, change no output")
    model = adapters.detach()
    with torch.no_grad():
        _require(torch.equal(host.output(model(**inputs)), expected), "detach() does not leave the bare model")
    _require(list(model.state_dict()) == list(bare.state_dict()), "detach() leaves other keys in state_dict()")
    _require(all(p.requires_grad for p in model.parameters()), "detach() leaves parameters frozen that trained before")
    _require(not any("forward" in vars(module) for module in model.modules()), "detach() leaves a bound forward")


def gradients_reach_every_parameter(factory: AdapterFactory, host: Host) -> None:
    """A training loss reaches every parameter, except those that `never_trained` names."""
    adapters = adapted(factory, host)
    for seed in range(8):
        train(adapters, host, host.inputs(seed, 2))
    # By name within the site: an expert that no row chose at one site is chosen at another.
    reached: dict[str, bool] = {}
    for module_name, module in adapters.state.modules():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                key = f"shared.{name}" if module_name == "shared" else name
                reached[key] = reached.get(key, False) or (parameter.grad is not None and bool(parameter.grad.any()))
    never = factory.capabilities.never_trained
    for name, seen in reached.items():
        declared = name.endswith(never) if never else False
        _require(seen or declared, f"no gradient reaches the parameter {name!r}: use it in forward, or declare it in "
                 f"Capabilities(never_trained=({name!r},))")  # fmt: skip
        _require(not (seen and declared), f"a gradient reaches {name!r}, which Capabilities(never_trained=...) denies")


def rows_stand_alone(factory: AdapterFactory, host: Host) -> None:
    """A batch of mixed tasks equals its rows one by one."""
    adapters = adapted(factory, host)
    for padded in (0, 3):
        inputs = host.inputs(1, padded)
        together = run(adapters, host, inputs)
        one_by_one = [
            run(adapters, host, {name: value[[row]] for name, value in inputs.items()}, IDS[[row]])
            for row in range(ROWS)
        ]
        off = float((together - torch.cat(one_by_one)).abs().max())
        said = f"rows of a batch differ by {off:.2g} from the same rows alone"
        _hold(factory.capabilities.row_independent, off < TOLERANCE, "row_independent", said)


def padding_changes_nothing(factory: AdapterFactory, host: Host) -> None:
    """More padding leaves real positions as they were."""
    if host.pad is None:
        return
    adapters, inputs = adapted(factory, host), host.inputs(1, 3)
    short, long = run(adapters, host, inputs), run(adapters, host, host.pad(inputs, 5))
    real = host.real(inputs)
    off = float((short[real] - long[:, : short.shape[1]][real]).abs().max())
    said = f"with more padding real positions differ by {off:.2g}"
    _hold(factory.capabilities.padding_independent, off < TOLERANCE, "padding_independent", said)


def merge_equals_routing(factory: AdapterFactory, host: Host) -> None:
    """The merged model computes what the adapted one does; `unmerge` gives back every bit."""
    adapters, inputs = adapted(factory, host), host.inputs(1, 2)
    by_task = factory.capabilities.routing == "task"
    if factory.capabilities.not_mergeable is not None:
        try:
            adapters.merge(task=0 if by_task else None)
        except NotMergeable:
            return
        raise ContractError("merge() worked, but Capabilities(not_mergeable=...) says why it cannot")
    before = copy.deepcopy(adapters.model.state_dict())
    for task in range(ROWS) if by_task else [None]:
        ids = torch.full((ROWS,), task or 0)
        expected = run(adapters, host, inputs, ids)
        adapters.merge(task=task)
        off = float((run(adapters, host, inputs, ids) - expected).abs().max())
        _require(off < TOLERANCE, f"the merged model differs by {off:.2g} from the adapted one: delta_weight(task) "
                 "must be the adapter's whole effect; else declare Capabilities(not_mergeable='why')")  # fmt: skip
        adapters.unmerge()
        same = all(torch.equal(value, before[key]) for key, value in adapters.model.state_dict().items())
        _require(same, "unmerge() does not give back every bit")


def save_and_load(factory: AdapterFactory, host: Host) -> None:
    """Loaded onto a bare model, adapters compute what they did when saved."""
    adapters, inputs = adapted(factory, host), host.inputs(1, 2)
    expected = run(adapters, host, inputs)
    with tempfile.TemporaryDirectory() as folder:
        adapters.save(folder)
        model = host.build().double()
        torch.manual_seed(99)
        again = load(model, folder)
    again.model.double()
    again.load_state_dict(adapters.state_dict())  # in double precision
    _require(again.factory == factory, f"the configuration comes back as {again.factory}, saved was {factory}")
    run(again, host, host.inputs(3, 0))  # a start that looks at the first batch must not be made again
    _require(torch.equal(run(again, host, inputs), expected), "saved and loaded, the adapters compute other values: "
             "state_dict() must hold all that forward reads")  # fmt: skip


def copies_are_independent(factory: AdapterFactory, host: Host) -> None:
    """A deep copy and a pickle compute the same, and know nothing of the original."""
    adapters, inputs = adapted(factory, host), host.inputs(1, 0)
    train(adapters, host, inputs)  # leaves graphs behind, which a copy must not trip over
    expected = run(adapters, host, inputs)
    buffer = io.BytesIO()
    torch.save(adapters.model, buffer)
    buffer.seek(0)
    for how, twin in (
        ("deep copy", copy.deepcopy(adapters.model)),
        ("pickle", torch.load(buffer, weights_only=False)),
    ):
        other = attachment(twin)
        _require(torch.equal(run(other, host, inputs), expected), f"a {how} computes other values")
        for parameter in other.parameters():
            parameter.data.zero_()
        run(other, host, inputs)
        _require(torch.equal(run(adapters, host, inputs), expected), f"changing a {how} changes the original")


def auxiliary_losses_are_named(factory: AdapterFactory, host: Host) -> None:
    """Training records the declared losses, each finite and with a gradient; evaluation records none."""
    adapters, inputs = adapted(factory, host), host.inputs(1, 2)
    adapters.model.train()
    adapters.model(**inputs, task_ids=IDS)
    losses = adapters.aux_losses()
    declared = factory.capabilities.aux_losses
    _require(tuple(losses) == declared, f"training records the losses {tuple(losses)}, Capabilities(aux_losses="
             f"{declared}) names others")  # fmt: skip
    for name, value in losses.items():
        _require(bool(torch.isfinite(value)), f"the auxiliary loss {name!r} is {float(value.detach())}")
    adapters.model.eval()
    run(adapters, host, inputs)
    _require(not adapters.aux_losses(), f"evaluation records the losses {tuple(adapters.aux_losses())}, wanted none")


def task_ids_are_needed(factory: AdapterFactory, host: Host) -> None:
    """A method that routes by task refuses a call without ids, or with the wrong ones; others take any call."""
    adapters, inputs = adapted(factory, host), host.inputs(1, 0)
    if factory.capabilities.routing != "task":
        run(adapters, host, inputs, None)
        return
    for what, ids in (("without task ids", None), ("with ids beyond num_tasks", IDS + (task_number(factory) or ROWS))):
        try:
            run(adapters, host, inputs, ids)
        except MissingRouting:
            continue
        raise ContractError(f"a call {what} works, but Capabilities(routing='task') says that rows need them")


def fast_paths_are_the_definitions(factory: AdapterFactory, host: Host) -> None:
    """Values and gradients are the same by fast paths and by definitions."""
    found = []
    for fast in (True, False):
        with fast_paths(fast):
            adapters = adapted(factory, host)
            loss = train(adapters, host, host.inputs(1, 2))
            gradients = {name: p.grad for name, p in adapters.named_parameters()}
            found.append({"loss": loss.detach(), "output": run(adapters, host, host.inputs(2, 0)), **gradients})
    for name, value in found[0].items():
        other = found[1][name]
        same = value is other if value is None or other is None else _near(value, other)
        _require(same, f"the fast path's {'' if name in ('loss', 'output') else 'gradient of '}{name} is not the "
                 "definition's")  # fmt: skip


CLAUSES: tuple[Clause, ...] = (
    count_is_the_closed_form,
    identity_at_the_start,
    bare_model_is_untouched,
    gradients_reach_every_parameter,
    task_ids_are_needed,
    rows_stand_alone,
    padding_changes_nothing,
    merge_equals_routing,
    save_and_load,
    copies_are_independent,
    auxiliary_losses_are_named,
    fast_paths_are_the_definitions,
)
