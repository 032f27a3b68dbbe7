"""What one forward pass knows: the tasks of its rows, its padding masks, and what the adapters recorded.

A forward begins with the outermost call of a module that holds adapted layers, whatever module that is, and ends with
it. Threads and tasks that share a model have a `Forward` and `Settings` each: nothing that a call was given can reach
a call of somebody else. One `Runtime` belongs to one attached model and finds both. It is plain data reached through
the model's modules, so a deep copy or a pickle of the model takes its own along.

What a forward knew outlives it in one way. Gradient checkpointing runs a block again during backward, in whatever
thread, maybe after other forwards. `Memory` is what such a block needs to see; it is found by the block's input.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .calls import Scope
from .errors import MissingRouting
from .layouts import Arranged
from .masks import Mask
from .ops.views import same_values, without_graph
from .settings import DEFAULT, Settings
from .siblings import Opened

T = TypeVar("T")


_SEVERAL = (
    "a checkpointed part of the model is computed again, and several forwards with other task ids or another routing "
    "wait for their backward: call backward after each forward, or checkpoint whole blocks"
)
OF_MASKS = "token_shares."
"""Begins the keys of `Forward.values` that follow from the masks."""
_SETTINGS: ContextVar[Mapping[object, Settings]] = ContextVar("moepeft_settings", default={})  # noqa: B039


@dataclass
class Forward:
    """One forward pass.

    Attributes:
        task_ids: shape (rows, positions, ids), see `moepeft.given.checked_ids`; one row of them stands for all rows,
            one position for all positions.
        scopes: of the calls under way, the outermost first.
        settings: of its thread when it began.
        goes_on: it continues an earlier one (cached decoding, a decoder after a separate encoder call).
        recomputes: it is a block that checkpointing computes again during backward.
        grad: autograd was on when it began.
        grad_expected: and the model was training.
        without_grad: the last call ran without autograd, as reentrant checkpointing runs a block at first.
        losses: loss name -> site name, numbered from its second use on -> term, as `AdapterFactory.aux_loss` takes it.
        values: what sites tell each other within a forward, by key.
        of_inputs: what sites made of an input that others receive as well, by key, after that input and its version.
        prepared: site name -> what the method made for the site when the forward began (`moepeft.preparing`).
        counted: site name -> what the site counted for `moepeft.protocols.Stepping.after_step`.
        sequence_first: a block has been seen that gets (positions, rows, features).
        transposed: names of modules of which a layer has got (positions, rows, features).
        masks: made of what calls were given, one of each tensor.
        tables: name of an attention module -> its inputs that are rows (see `moepeft.hooks`).
        input: the input of the layer that runs, and `given` as the host gave it.
        mark: tells forwards apart, outside of compiled code.
        tasks: of the rows, (rows,), where each has one; one of them stands for all rows.
        opened: kind of module -> the last inner call of one.
    """

    task_ids: Tensor | None = None
    scopes: list[Scope] = field(default_factory=lambda: [Scope()])
    settings: Settings = field(default_factory=lambda: DEFAULT)  # torch 2.11 compiles no default that is an object
    goes_on: bool | Tensor = False
    recomputes: bool = False
    grad: bool = False
    grad_expected: bool = False
    without_grad: bool = False
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    of_inputs: dict[str, tuple[Tensor, int | None, Any]] = field(default_factory=dict)
    prepared: Mapping[str, Any] = field(default_factory=dict)
    counted: dict[str, Tensor] = field(default_factory=dict)
    sequence_first: bool = False
    transposed: set[str] = field(default_factory=set)
    masks: list[Mask] = field(default_factory=list)
    tables: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    input: Arranged | None = None
    given: Tensor | None = None
    mark: object = None
    opened: dict[type, Opened] = field(default_factory=dict)
    tasks: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        ids = self.task_ids
        self.tasks = None if ids is None or ids.shape[1:] != (1, 1) else ids[:, 0, 0]

    def beside(self, task_ids: Tensor | None) -> Forward:
        """The same forward for inputs of other rows, such as an expert's tokens; what is recorded is recorded here.

        Args:
            task_ids: of these rows, (rows, 1, ids).
        """
        return replace(
            self,
            task_ids=task_ids,
            scopes=[Scope()],
            values={},
            of_inputs={},
            masks=[],
            tables={},
            input=None,
            given=None,
            opened={},
        )

    @property
    def packed(self) -> bool:
        """Whether the positions of a row have task ids of their own."""
        return self.task_ids is not None and self.task_ids.shape[1] > 1

    @property
    def scope(self) -> Scope:
        """Of the innermost call under way."""
        return self.scopes[-1]


@dataclass(eq=False)
class Memory:
    """What a block that is computed again must see. It holds no graph but that of what was prepared.

    A block that ran without gradients at first, as reentrant checkpointing lets it, prepares its own in the second run.
    """

    task_ids: Tensor | None
    scope: Scope
    settings: Settings
    goes_on: bool | Tensor
    values: Mapping[str, Any]
    prepared: Mapping[str, Any] = field(default_factory=dict)
    mark: object = None
    without_grad: bool = False
    used: bool = False
    shared: bool = False

    def is_like(self, other: Memory) -> bool:
        """Whether a block may take one for the other: of one forward, or of two that told it the same."""
        told = any(not key.startswith(OF_MASKS) for key in (*self.values, *other.values))
        return (self.mark is other.mark or not told) and same_values(self.task_ids, other.task_ids)

    def resume(self) -> Forward:
        """A forward for the block alone; what it records is nobody's."""
        if self.shared:
            raise MissingRouting(_SEVERAL)
        self.used = True
        again = Forward(
            self.task_ids, [self.scope], self.settings, self.goes_on, recomputes=True, values=dict(self.values)
        )
        again.prepared = {} if self.without_grad else self.prepared
        return again


class Runtime:
    """Finds the forward and the settings of the thread that asks.

    Attributes:
        synchronised: what methods compute across rows they compute across all processes' rows (`joint_sum`).
        tallies: site name -> the sum of what it counted in training forwards since the last optimiser step.
    """

    def __init__(self) -> None:
        self.synchronised = False
        self.tallies: dict[str, Tensor] = {}
        self._renew()

    def _renew(self) -> None:
        self.key = object()
        self.local = threading.local()
        self.memories: WeakKeyDictionary[Any, Memory] = WeakKeyDictionary()
        self.disabled: set[object] = set()  # one for each caller inside of `Attachment.disabled`; no copy is inside

    @property
    def settings(self) -> Settings:
        """Of this thread or task."""
        if torch.compiler.is_compiling():  # the compiler does not know context variables
            return getattr(self.local, "settings", DEFAULT)
        return _SETTINGS.get().get(self.key, DEFAULT)

    @contextmanager
    def changed(self, **changes: Any) -> Iterator[None]:
        """Inside, this thread's settings differ."""
        before = self.settings
        changed = replace(before, **changes)
        token = _SETTINGS.set({**_SETTINGS.get(), self.key: changed})
        self.local.settings = changed
        try:
            yield
        finally:
            _SETTINGS.reset(token)
            self.local.settings = before

    @property
    def forward(self) -> Forward | None:
        """The forward under way in this thread."""
        return getattr(self.local, "forward", None)

    @property
    def last(self) -> Forward:
        """The last forward of this thread that has begun."""
        return getattr(self.local, "last", None) or Forward()

    def begin(self, forward: Forward) -> None:
        """A forward is under way in this thread."""
        self.local.session = None
        if not torch.compiler.is_compiling():
            forward.mark = object()
        self.local.forward = self.local.last = forward

    def end(self) -> None:
        """The forward is over, however it ended: no layer receives an input of it again."""
        last = self.last
        self.local.forward = None
        last.of_inputs, last.tables, last.input, last.given = {}, {}, None, None
        last.masks, last.prepared, last.opened = [], {}, {}
        for site, counts in last.counted.items():
            before = self.tallies.get(site)  # on another device, if the model was moved since
            self.tallies[site] = counts if before is None else before.to(counts.device) + counts
        last.counted = {}
        last.scopes = [last.scopes[0].past_the_call()]

    def take_tallies(self) -> dict[str, Tensor]:
        """The tallies since they were last taken, by site."""
        taken, self.tallies = self.tallies, {}
        return taken

    @contextmanager
    def resumed(self, memory: Memory) -> Iterator[None]:
        """Inside, a block of an earlier forward is computed again."""
        self.local.forward = memory.resume()
        try:
            yield
        finally:
            self.local.forward = None

    def memory(self) -> Memory:
        """What the forward under way knows, for a block that may be computed again."""
        forward = self.forward
        assert forward is not None
        values = {key: without_graph(value) for key, value in forward.values.items()}
        scope = forward.scope.past_the_call()
        memory = Memory(forward.task_ids, scope, forward.settings, forward.goes_on, values, forward.prepared)
        memory.without_grad, memory.mark = not torch.is_grad_enabled(), forward.mark
        return memory

    def remember(self, block_input: Tensor) -> None:
        """Note what the forward under way knows, for the block that receives this input."""
        storage, memory = block_input.untyped_storage(), self.memory()
        before = self.memories.get(storage)
        # One tensor went into two forwards: nothing tells their blocks apart.
        memory.shared = before is not None and not before.used and not memory.is_like(before)
        self.memories[storage] = memory

    @contextmanager
    def resumed_at(self, x: Tensor, backward: int) -> Iterator[None]:
        """Inside, one layer is computed again whose block did not say so: by its input, or after another of its block.

        Args:
            x: the layer's input.
            backward: number of the backward pass.
        """
        session: tuple[int, Memory, Forward] | None = getattr(self.local, "session", None)
        found = self.memories.get(x.untyped_storage())
        if session is None or session[0] != backward or found not in (None, session[1]):
            memory = self.memory_of((x,))
            session = self.local.session = (backward, memory, memory.resume())
        self.local.forward = session[2]
        try:
            yield
        finally:
            self.local.forward = None

    def memory_of(self, inputs: tuple[Tensor, ...]) -> Memory:
        """What the forward knew of which a block with these inputs is computed again.

        Raises:
            MissingRouting: several forwards wait for their backward, and it cannot be told which it is.
        """
        for x in inputs:
            found = self.memories.get(x.untyped_storage())
            if found is not None:
                return found
        known = list(self.memories.values())
        waiting = [memory for memory in known if not memory.used] or known
        if not waiting:
            return Memory(self.settings.task_ids, Scope(), self.settings, goes_on=False, values={})
        if not all(memory.is_like(waiting[-1]) for memory in waiting):
            raise MissingRouting(_SEVERAL)
        return waiting[-1]

    def __getstate__(self) -> dict[str, Any]:
        # Activations of a forward carry graphs, which neither pickle nor deepcopy; they are nobody's state.
        return {"synchronised": self.synchronised, "tallies": self.tallies}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._renew()
