"""Who is timed: the bare model, the `peft` package's adapter as reference, the methods, their merged forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import moepeft
from benchmarks.protocols.protocol import UsageError
from benchmarks.speed.hosts import kind_of, sharing_copy, vocabulary_embeddings
from moepeft import Attachment
from moepeft.protocols import AdapterFactory
from moepeft.sites import select_sites

FORWARD_ONLY = "frozen, forward only"
FROZEN = "frozen"
REFERENCE_RANK = 8
COMPILED_VARIANTS = 256
"""Contestants share the host's code, and torch.compile keeps one variant per contestant."""


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
    """

    label: str
    model: nn.Module
    call: Callable[..., Any]
    parameters: tuple[nn.Parameter, ...] = ()
    attachment: Attachment | None = None
    trains: bool = True
    merged: bool = field(default=False)

    @property
    def eager(self) -> Contestant:
        """The same one, not compiled: operations and saved tensors are counted on it."""
        return replace(self, call=self.model)

    def task_ids(self, rows: int, tasks: int) -> Tensor | None:
        """Tasks of a batch's rows: all tasks in turn; task 0 alone once it is merged; None for others' models."""
        if self.attachment is None:
            return None
        device = next(self.model.parameters()).device
        ids = torch.arange(rows, device=device) % tasks
        return torch.zeros_like(ids) if self.merged else ids

    def turn(self) -> AbstractContextManager[None]:
        """The state in which it is timed."""
        return self._merged() if self.merged else nullcontext()

    @contextmanager
    def _merged(self) -> Iterator[None]:
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
    return Contestant(reference_label(rank), model, _callable(model, compiled), trained)


def reference_label(rank: int = REFERENCE_RANK) -> str:
    """How the reference's rows are called."""
    from peft import LoraConfig

    return f"peft {LoraConfig().peft_type.value} r={rank}"


def adapted(
    label: str, host: nn.Module, factory: AdapterFactory, sites: Sequence[str] | None, *, compiled: bool
) -> Contestant:
    """The host with a method's adapters; raises what `moepeft.attach` raises."""
    model = sharing_copy(host)
    attachment = moepeft.attach(model, factory, sites)
    return Contestant(label, model, _callable(model, compiled), tuple(attachment.parameters()), attachment)


def merged(contestant: Contestant) -> Contestant | None:
    """The contestant with its update folded into the weights; None for a method that cannot."""
    attachment = contestant.attachment
    if attachment is None or attachment.factory.capabilities.not_mergeable is not None:
        return None
    return replace(contestant, label=f"{contestant.label} (merged)", merged=True)


def _callable(model: nn.Module, compiled: bool) -> Callable[..., Any]:
    if not compiled:
        return model
    import torch._dynamo

    torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = COMPILED_VARIANTS
    function: Callable[..., Any] = torch.compile(model)
    return function
