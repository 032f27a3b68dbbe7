"""Who is timed: the bare model, the `peft` package's adapter as reference, the methods, their merged forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import moepeft
from benchmarks.instruments.compiler import compiled_call
from benchmarks.protocols.errors import UsageError
from benchmarks.speed.hosts import kind_of, sharing_copy, vocabulary_embeddings
from benchmarks.speed.options import Mode
from moepeft import Attachment
from moepeft.errors import NoMatchingSite
from moepeft.fast import fast_paths
from moepeft.protocols import AdapterFactory
from moepeft.sites import select_sites

FORWARD_ONLY = "frozen, forward only"
FROZEN = "frozen"
REFERENCE_RANK = 8


@dataclass(frozen=True)
class Contestant:
    """A model that is called, and what a training step must know of it.

    Attributes:
        label: names its rows.
        model: the module.
        call: what is called: the module, or its compiled form.
        parameters: what trains; empty for the bare model.
        attachment: the adapters, None where they are not this library's.
        trains: whether a training step goes backward.
        merged: its update is folded into the weights while it has its turn.
        without: what else surrounds its turn: fast paths that are switched off.
        sites: how many layers are adapted.
    """

    label: str
    model: nn.Module
    call: Callable[..., Any]
    parameters: tuple[nn.Parameter, ...] = ()
    attachment: Attachment | None = None
    trains: bool = True
    merged: bool = False
    without: Callable[[], AbstractContextManager[Any]] | None = None
    sites: int = 0

    @property
    def eager(self) -> Contestant:
        """The same one, not compiled: operations and saved tensors are counted on it."""
        return replace(self, call=self.model)

    def task_ids(self, rows: int, tasks: int) -> Tensor | None:
        """Tasks of a batch's rows, sorted as in training; task 0 alone once it is merged; None for others' models."""
        if self.attachment is None:
            return None
        device = next(self.model.parameters()).device
        ids = (torch.arange(rows, device=device) % tasks).sort().values
        return torch.zeros_like(ids) if self.merged else ids

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The state in which it is timed."""
        with (
            nullcontext() if self.without is None else self.without(),
            self._merge_meanwhile() if self.merged else nullcontext(),
        ):
            yield

    @contextmanager
    def _merge_meanwhile(self) -> Iterator[None]:
        # The weights belong to all contestants: merged only during its own turn, they need no second copy.
        assert self.attachment is not None
        self.attachment.merge(task=0 if self.attachment.factory.capabilities.routing == "task" else None)
        try:
            yield
        finally:
            self.attachment.unmerge()


def frozen(host: nn.Module, *, compiled: bool, backward: bool) -> Contestant:
    """The bare model; with `backward`, gradients go through it to the first layer's input and no further."""
    model = sharing_copy(host).requires_grad_(False)
    if backward and kind_of(host) != "layer":
        for embedding in vocabulary_embeddings(model):
            embedding.register_forward_hook(_require_gradient)
    return Contestant(FROZEN if backward else FORWARD_ONLY, model, _callable(model, compiled), trains=backward)


def _require_gradient(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output if torch.is_inference(output) else output.requires_grad_(torch.is_grad_enabled())


def reference(
    host: nn.Module, sites: Sequence[str] | None, *, compiled: bool, rank: int = REFERENCE_RANK
) -> Contestant:
    """The `peft` package's low-rank adapter on the same sites, through its public interface.

    Raises:
        UsageError: the package is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError(
            "every time is given beside the peft package's; install it: pip install 'moepeft[peft]'"
        ) from error
    names = [site.name for site in select_sites(moepeft.find_sites(host), sites)]
    config = LoraConfig(r=rank, target_modules=names)
    model: nn.Module = get_peft_model(sharing_copy(host), config)
    trained = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
    return Contestant(reference_label(rank), model, _callable(model, compiled), trained, sites=len(names))


def reference_label(rank: int = REFERENCE_RANK) -> str:
    """How the reference's rows are called."""
    from peft import LoraConfig

    return f"peft {LoraConfig().peft_type.value} r={rank}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A method that takes part: its configuration, and which fast paths are switched off while it has its turn."""

    factory: AdapterFactory
    without: Callable[[], AbstractContextManager[Any]] | None = None


def enter(
    factories: Mapping[str, AdapterFactory], definitions: Mapping[str, Callable[..., Any] | None] = MappingProxyType({})
) -> dict[str, Entry]:
    """The methods by the names of their rows, each followed by a twin for every definition.

    Args:
        factories: the configurations.
        definitions: by name, what a twin computes by definition; None for everything.
    """
    entries = {}
    for name, factory in factories.items():
        entries[name] = Entry(factory)
        for definition, function in definitions.items():
            what = "definition" if function is None else f"{definition} by definition"
            entries[f"{name} ({what})"] = Entry(factory, partial(fast_paths, False, of=function))
    return entries


def adapted(label: str, host: nn.Module, entry: Entry, sites: Sequence[str] | None, *, compiled: bool) -> Contestant:
    """The host with a method's adapters; raises what `moepeft.attach` raises."""
    model = sharing_copy(host)
    attachment = moepeft.attach(model, entry.factory, sites)
    parameters = tuple(attachment.parameters())
    return Contestant(
        label,
        model,
        _callable(model, compiled),
        parameters,
        attachment,
        without=entry.without,
        sites=attachment.parameter_count().sites,
    )


def merged(contestant: Contestant) -> Contestant | None:
    """The contestant with its update folded into the weights; None for a method that cannot, and for a twin."""
    attachment = contestant.attachment
    if (
        attachment is None
        or attachment.factory.capabilities.not_mergeable is not None
        or contestant.without is not None
    ):
        return None
    return replace(contestant, label=f"{contestant.label} (merged)", merged=True)


def _callable(model: nn.Module, compiled: bool) -> Callable[..., Any]:
    return compiled_call(model) if compiled else model


# ---------------------------------------------------------------------- all of them

Failures = dict[str, Exception]
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Lineup:
    """The contestants in the order of the rows.

    Attributes:
        forward_only: the bare model without gradients.
        frozen: the bare model with gradients to its first layer's input.
        others: the reference, then the methods.
        with_merged: whether methods that can be merged are timed in that state as well.
    """

    forward_only: Contestant
    frozen: Contestant
    others: tuple[Contestant, ...]
    with_merged: bool

    def of(self, mode: Mode) -> list[Contestant]:
        """Who takes part: inference has no gradients, but merged models."""
        if mode in ("train", "host"):
            return [self.forward_only, self.frozen, *self.others]
        chosen = [replace(self.forward_only, label=FROZEN)]
        for contestant in self.others:
            chosen.append(contestant)
            folded = merged(contestant) if self.with_merged else None
            chosen += [] if folded is None else [folded]
        return chosen


def line_up(
    host: nn.Module, entries: Mapping[str, Entry], sites: Sequence[str] | None, *, compiled: bool
) -> tuple[Lineup, Failures]:
    """Build everyone on one copy of the weights; a method that cannot be attached is named with its error."""
    try:  # what is wrong with the sites is wrong with the command, not with a row
        unit = reference(host, sites, compiled=compiled)
    except NoMatchingSite as error:
        raise UsageError(f"--sites: {error}") from error
    forward_only = frozen(host, compiled=compiled, backward=False)
    bare = frozen(host, compiled=compiled, backward=True)
    builders = {name: partial(adapted, name, host, entry, sites, compiled=compiled) for name, entry in entries.items()}
    methods, failures = build_all(builders)
    return Lineup(forward_only, bare, (unit, *methods), not compiled), failures


def build_all(builders: Mapping[str, Callable[[], Contestant]]) -> tuple[list[Contestant], Failures]:
    """Build the contestants; one that cannot be built becomes a row that says why."""
    built, failures = [], {}
    for label, build in builders.items():
        made = attempt(build)
        if isinstance(made, Exception):
            failures[label] = made
        else:
            built.append(made)
    return built, failures


def attempt(work: Callable[[], Made]) -> Made | Exception:
    """What the work gives, or the error it raised."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return error
    except Exception as error:
        return error
