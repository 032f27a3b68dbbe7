"""What every registered method and preset must do on every host, or declare that it does not.

Each clause is here because a published implementation fails it. Declared exceptions are asserted too: a method that
says its rows depend on their batch must be seen to do so.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moepeft
from moepeft.errors import AuxLossDetached, GradientsLost, MissingRouting, Unsupported
from moepeft.registry import factory_class
from moepeft.testing import CLAUSES, Clause, Host, check_clause, check_method
from tests.support.hosts import HOSTS, batch, build, output, rows_of

TASKS = 4
Inputs = Mapping[str, Tensor]
IDS = torch.tensor([0, 1, 2, 3])


def make(spec: str, **fields: Any) -> moepeft.AdapterFactory:
    return moepeft.method(spec, num_tasks=TASKS, **fields)


def has_fast_path(factory: moepeft.AdapterFactory) -> bool:
    """Whether a definition that the method's module uses has one."""
    return any(hasattr(value, "definition") for value in vars(sys.modules[type(factory).__module__]).values())


@pytest.fixture(autouse=True)
def fast(request: pytest.FixtureRequest) -> Iterator[None]:
    """By fast paths, unless a test asks for definitions."""
    with moepeft.fast_paths(getattr(request, "param", True)):
        yield


# Presets with equal fields (LoRA's two) are one configuration and run once. A preset such as `released_math` is the
# release with another setting's hyper-parameters: the same arithmetic.
_ALL = [
    f"{name}@{preset}"
    for name in moepeft.available()
    for preset in factory_class(name).presets
    if not preset.startswith("released_")
]
SPECS = list({make(spec): spec for spec in reversed(_ALL)}.values())[::-1]

BATCH_FIRST = [spec for spec in SPECS if make(spec).capabilities.batch_first]
BY_DEFINITIONS = [spec for spec in BATCH_FIRST if has_fast_path(make(spec))]
everywhere = pytest.mark.parametrize(
    ("spec", "fast"),
    [
        *(pytest.param(spec, True, id=spec) for spec in BATCH_FIRST),
        *(pytest.param(spec, False, id=f"{spec}-by-definition", marks=pytest.mark.slow) for spec in BY_DEFINITIONS),
    ],
    indirect=["fast"],
)
on_hosts = pytest.mark.parametrize("host", HOSTS)


def attached(
    host: str, spec: str, *, random: bool = True, noise: float = 0.1, **fields: Any
) -> tuple[nn.Module, moepeft.Attachment]:
    """A host with adapters; `random` moves every adapter parameter away from its start, as training would."""
    model = build(host)
    torch.manual_seed(5)
    adapters = moepeft.attach(model, make(spec, **fields))
    if random:
        run(model, batch(model), IDS)  # data-aware initialisation happens now, not in the middle of a comparison
        generator = torch.Generator().manual_seed(7)
        for parameter in adapters.parameters():
            parameter.data.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model, adapters


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor], ids: Tensor | None = None) -> Tensor:
    return output(model, inputs, **({} if ids is None else {"task_ids": ids}))


def train_step(model: nn.Module, adapters: moepeft.Attachment, inputs: dict[str, Tensor]) -> None:
    model.train()
    loss = output(model, inputs, task_ids=IDS).square().mean() + adapters.aux_loss()
    loss.backward()
    model.eval()


def _inputs(name: str) -> Callable[[int, int], Inputs]:
    return lambda seed, padded: batch(build(name), padded=padded, seed=seed)


def _longer(inputs: Inputs, positions: int) -> Inputs:
    longer = dict(inputs)
    for name, fill in (("input_ids", 1), ("attention_mask", 0)):
        longer[name] = nn.functional.pad(inputs[name], (0, positions), value=fill)
    return longer


def _real(inputs: Inputs) -> Tensor:
    """The decoder's positions, none of which is padding; else the mask."""
    decoder = inputs.get("decoder_input_ids")
    return inputs["attention_mask"].bool() if decoder is None else torch.ones_like(decoder, dtype=torch.bool)


def _output(result: Any) -> Tensor:
    value: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return value


MODELS = {name: Host(name, lambda name=name: build(name), _inputs(name), _longer, _real, _output) for name in HOSTS}


@everywhere
@on_hosts
@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_clause(clause: Clause, host: str, spec: str) -> None:
    """The contract that ships with the library, on models of transformers."""
    check_clause(clause, make(spec), MODELS[host])


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_check_method(spec: str) -> None:
    """On the hosts that ship with the library; configured for tasks by the check itself."""
    check_method(moepeft.method(spec))


@everywhere
@on_hosts
@pytest.mark.parametrize("memory", ["for all", "for the base"])
def test_model_made_without_memory(host: str, spec: str, memory: str) -> None:
    """As large models are made to be sharded: its shape first, then memory, which holds anything, then values."""
    bare, (_, wanted) = build(host), attached(host, spec, random=False)
    with torch.device("meta"):
        model = HOSTS[host]().eval()
    adapters = moepeft.attach(model, make(spec))
    with pytest.raises(Unsupported, match="to_empty"):
        adapters.reset_parameters()
    if memory == "for all":
        model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.detach().fill_(3)
        with pytest.raises(Unsupported, match="reset_parameters"):
            run(model, batch(model), IDS)
        model.load_state_dict(bare.state_dict(), strict=False)
    else:
        model.load_state_dict(bare.state_dict(), strict=False, assign=True)
    for name, value in bare.named_buffers():  # those of transformers that are in no state dict
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, value.clone())
    torch.manual_seed(5)
    adapters.reset_parameters()
    assert_same(adapters, wanted)


@everywhere
@on_hosts
def test_start_again(host: str, spec: str) -> None:
    model, adapters = attached(host, spec)
    train_step(model, adapters, batch(model))
    before = dict(adapters.named_parameters())
    torch.manual_seed(5)
    adapters.reset_parameters()
    assert all(before[name] is parameter for name, parameter in adapters.named_parameters())
    assert_same(adapters, attached(host, spec, random=False)[1])


def assert_same(one: moepeft.Attachment, other: moepeft.Attachment) -> None:
    """Bit for bit, in what they hold and in what they make of a batch."""
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    outputs = []
    for model in (one.model, other.model):
        torch.manual_seed(6)  # a data-aware start draws
        outputs.append(run(model, batch(model), IDS))
    assert torch.equal(*outputs)


@everywhere
@on_hosts
def test_checkpointing_parity_and_refusal(host: str, spec: str) -> None:
    gradients = []
    for reentrant in (None, False):
        model, adapters = attached(host, spec)
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        train_step(model, adapters, batch(model, padded=2))
        gradients.append([p.grad for p in adapters.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        assert plain is None or torch.allclose(plain, recomputed, atol=1e-7)

    if adapters.factory.capabilities.aux_losses:
        model, adapters = attached(host, spec)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        # A method on the second half of a block alone sees an input that was made without autograd, and says so first.
        with pytest.raises((AuxLossDetached, GradientsLost), match="use_reentrant"):
            train_step(model, adapters, batch(model))


@everywhere
@on_hosts
def test_inputs_go_with_the_forward(host: str, spec: str) -> None:
    model, adapters = attached(host, spec)
    received: list[weakref.ref[torch.UntypedStorage]] = []
    for site in adapters.sites:
        module = model.get_submodule(site.name)
        module.register_forward_pre_hook(lambda _, args: received.append(weakref.ref(args[0].untyped_storage())))
    run(model, batch(model), IDS)
    assert len(received) >= len(adapters.sites)
    assert not [left for left in received if left() is not None]


@everywhere
@on_hosts
def test_bfloat16_is_finite_and_near(host: str, spec: str) -> None:
    # Where tokens choose, one near a tie chooses otherwise in half precision: there updates are kept small.
    model, adapters = attached(host, spec, noise=0.01 if make(spec).capabilities.routing == "token" else 0.1)
    inputs = batch(model)
    exact = run(model, inputs, IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = run(model, inputs, IDS)
    kept = {name: p.data.clone() for name, p in adapters.named_parameters()}
    model.bfloat16()  # the base in half precision, the adapters kept in float32
    for name, parameter in adapters.named_parameters():
        parameter.data = kept[name]
    half = run(model, inputs, IDS)
    for value in (autocast, half):
        assert torch.isfinite(value).all()
        assert (value.float() - exact).norm() / exact.norm() < 0.1


@everywhere
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_cached_generation_or_declared(sample: bool, spec: str) -> None:
    model, adapters = attached("llama", spec)
    model.double()
    inputs = batch(model, rows=4, length=7)
    with adapters.route(task_ids=IDS):
        kwargs = {"do_sample": sample, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
        cached = model.generate(**inputs, use_cache=True, output_logits=True, return_dict_in_generate=True, **kwargs)
        full = model(input_ids=cached.sequences[:, :-1]).logits[:, 6:]
    same = torch.allclose(torch.stack(cached.logits, dim=1).double(), full, atol=1e-6)
    assert same == adapters.factory.capabilities.cache_consistent


@everywhere
@pytest.mark.parametrize("host", ["t5", "llama"])
def test_beam_search_keeps_tasks(host: str, spec: str) -> None:
    """Beams of mixed tasks equal those of each task alone."""
    model, adapters = attached(host, spec)
    inputs = {name: value for name, value in batch(model).items() if name != "decoder_input_ids"}
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    with adapters.route(task_ids=IDS):
        together = model.generate(**inputs, **options)
    assert together.shape[0] == 4
    if adapters.factory.capabilities.row_independent:
        for row in range(4):
            with adapters.route(task_ids=int(IDS[row])):
                assert torch.equal(model.generate(**rows_of(inputs, [row]), **options)[0], together[row])


@everywhere
def test_same_seed_same_bits(spec: str) -> None:
    results = []
    for _ in range(2):
        model, adapters = attached("bert", spec)
        optimiser = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
        for seed in range(3):
            optimiser.zero_grad()
            train_step(model, adapters, batch(model, seed=seed))
            optimiser.step()
            adapters.after_step()
        results.append(run(model, batch(model), IDS))
    assert torch.equal(*results)


@everywhere
def test_missing_and_wrong_task_ids(spec: str) -> None:
    model, adapters = attached("bert", spec)
    inputs = batch(model)
    needs = adapters.factory.capabilities.routing == "task"
    if not needs:
        output(model, inputs)
        return
    with pytest.raises(MissingRouting, match="task_ids"):
        output(model, inputs)
    with pytest.raises(MissingRouting, match="3 task ids for 4 rows"):
        output(model, inputs, task_ids=IDS[:3])
    with pytest.raises(MissingRouting, match="num_tasks=4"):
        output(model, inputs, task_ids=IDS + 1)


@everywhere
def test_config_round_trips_through_json(spec: str) -> None:
    factory = make(spec)
    assert moepeft.registry.from_config(factory.name, dataclasses.asdict(factory)) == factory
    assert hash(factory) == hash(make(spec))


def test_sequence_first_rows_are_refused_on_a_batch_first_model() -> None:
    """ChatGLM's layout: mixed rows cannot be told apart on a batch-first model, and the method must not guess."""
    model = build("bert")
    adapters = moepeft.attach(model, make("moelora", layout="sequence_first"))
    assert not adapters.factory.capabilities.batch_first
    with pytest.raises(MissingRouting, match="4 task ids for 7 rows"):
        output(model, batch(model), task_ids=IDS)
