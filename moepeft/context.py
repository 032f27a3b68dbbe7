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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .calls import Arranged, Scope
from .errors import MissingRouting
from .masks import Mask
from .ops.linear import token_shares
from .ops.processes import sum_over_processes
from .roles import Stream
from .sites import LinearSite

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What `with` blocks of an attachment have set, for one thread or task.

    Attributes:
        enabled: False inside `Attachment.disabled`.
        task_ids: set by `Attachment.route`; those given to the call itself win.
        masks: set by `Attachment.route`, by stream.
        stats: site name -> routing statistics, inside `Attachment.recording`.
        copies: how often `generate` repeats each row, in place.
    """

    enabled: bool = True
    task_ids: Tensor | None = None
    masks: Mapping[Stream, Mask] = field(default_factory=dict)
    stats: dict[str, dict[str, Tensor]] | None = None
    copies: int = 1


DEFAULT = Settings()
_SEVERAL = (
    "a checkpointed part of the model is computed again, and several forwards with other task ids wait for their "
    "backward: call backward after each forward, or checkpoint whole blocks"
)
_SETTINGS: ContextVar[Mapping[object, Settings]] = ContextVar("moepeft_settings", default={})  # noqa: B039


@dataclass
class Forward:
    """One forward pass of one thread.

    Attributes:
        task_ids: shape (rows,), or (rows, k) for rows of several tasks; one id stands for all rows.
        scopes: of the calls under way, the outermost first.
        settings: of its thread when it began.
        continues: it continues an earlier one (cached decoding, a decoder after a separate encoder call).
        recomputes: it is a block that checkpointing computes again during backward.
        grad: autograd was on when it began.
        grad_expected: and the model was training.
        without_grad: the last call ran without autograd, as reentrant checkpointing runs a block at first.
        losses: loss name -> site name, numbered from its second use on -> term, as `AdapterFactory.aux_loss` takes it.
        values: what sites tell each other within a forward, by key.
        of_inputs: what sites made of an input that others receive as well, by key, beside that input.
        counted: site name -> what the site counted for `moepeft.protocols.Stepping.after_step`.
        sequence_first: a block has been seen that gets (positions, rows, features).
        masks: made of what calls were given, by the tensor.
        tables: name of an attention module -> its inputs that are rows (see `moepeft.hooks`).
        input: the input of the layer that runs, and `given` as the host gave it.
    """

    task_ids: Tensor | None = None
    scopes: list[Scope] = field(default_factory=lambda: [Scope()])
    settings: Settings = DEFAULT
    continues: bool = False
    recomputes: bool = False
    grad: bool = False
    grad_expected: bool = False
    without_grad: bool = False
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    of_inputs: dict[str, tuple[Tensor, Any]] = field(default_factory=dict)
    counted: dict[str, Tensor] = field(default_factory=dict)
    sequence_first: bool = False
    masks: dict[int, Mask] = field(default_factory=dict)
    tables: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    input: Arranged | None = None
    given: Tensor | None = None

    @property
    def scope(self) -> Scope:
        """Of the innermost call under way."""
        return self.scopes[-1]


@dataclass(eq=False)
class Memory:
    """What a block that is computed again must see. It holds no graph."""

    task_ids: Tensor | None
    scope: Scope
    settings: Settings
    continues: bool
    values: Mapping[str, Any]
    used: bool = False
    shared: bool = False

    def resume(self) -> Forward:
        """A forward for the block alone; what it records is nobody's."""
        if self.shared:
            raise MissingRouting(_SEVERAL)
        self.used = True
        return Forward(
            self.task_ids, [self.scope], self.settings, self.continues, recomputes=True, values=dict(self.values)
        )


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
        self.local.forward = self.local.last = forward

    def end(self) -> None:
        """The forward is over, however it ended: no layer receives an input of it again."""
        last = self.last
        self.local.forward = None
        last.of_inputs, last.tables, last.input, last.given = {}, {}, None, None
        last.masks = {}
        for site, counts in last.counted.items():
            self.tallies[site] = self.tallies[site] + counts if site in self.tallies else counts
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
        values = {key: _without_graph(value) for key, value in forward.values.items()}
        scope = forward.scope.past_the_call()
        return Memory(forward.task_ids, scope, forward.settings, forward.continues, values)

    def remember(self, block_input: Tensor) -> None:
        """Note what the forward under way knows, for the block that receives this input."""
        storage, memory = block_input.untyped_storage(), self.memory()
        before = self.memories.get(storage)
        # One tensor went into two forwards: nothing tells their blocks apart.
        memory.shared = before is not None and not before.used and not _same_ids(before.task_ids, memory.task_ids)
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
            return Memory(self.settings.task_ids, Scope(), self.settings, continues=False, values={})
        if any(not _same_ids(memory.task_ids, waiting[-1].task_ids) for memory in waiting):
            raise MissingRouting(_SEVERAL)
        return waiting[-1]

    @property
    def losses(self) -> dict[str, dict[str, Any]]:
        """What the last forward of this thread recorded."""
        return self.last.losses

    @property
    def values(self) -> dict[str, Any]:
        """What sites of this thread's last forward told each other."""
        return self.last.values

    def __getstate__(self) -> dict[str, Any]:
        # Activations of a forward carry graphs, which neither pickle nor deepcopy; they are nobody's state.
        return {"synchronised": self.synchronised, "tallies": self.tallies}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._renew()


def _without_graph(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_() if value.requires_grad else value
    if isinstance(value, tuple):
        parts = [_without_graph(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _same_ids(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one is other:
        return one is other
    return one.shape == other.shape and torch.equal(one, other)


@dataclass
class SiteContext:
    """One site's view of the forward under way."""

    runtime: Runtime
    site: LinearSite

    def beside_the_rows(self) -> SiteContext:
        """The same site for an input that is no row of the batch, such as DeBERTa's table of relative positions.

        No mask and no tasks belong to such an input, and what an adapter records of it is nobody's.
        """
        beside = Runtime()
        beside.begin(Forward())
        return SiteContext(beside, self.site)

    @property
    def forward(self) -> Forward:
        """The forward under way; an empty one where an adapter is called by hand."""
        return self.runtime.forward or self.runtime.last

    def tasks(self, rows: int) -> Int[Tensor, "rows"]:
        """Task of each of `rows` input rows.

        Raises:
            MissingRouting: no ids were given, it is not known which row has which, or a row has several.
        """
        ids = self.task_sets(rows)
        if ids.shape[1] != 1:
            raise MissingRouting(
                f"site {self.site.name!r} takes one task per row, got task_ids of shape {tuple(ids.shape)}"
            )
        return ids[:, 0]

    def task_sets(self, rows: int) -> Int[Tensor, "rows ids"]:
        """Tasks of each of `rows` input rows, padded with -1 for methods that know rows of several tasks.

        Raises:
            MissingRouting: no ids were given, or it is not known which row has which.
        """
        ids = self.forward.task_ids
        if ids is None:
            raise MissingRouting(
                f"site {self.site.name!r} routes by task but the call had no task ids: pass task_ids (one per row) to "
                "the model call, or call it inside `with adapters.route(task_ids=...)`, in the same thread"
            )
        ids = ids.unsqueeze(1) if ids.dim() == 1 else ids
        return self.spread(ids, rows, f"{ids.shape[0]} task ids")

    def spread(self, values: Tensor, rows: int, what: str) -> Tensor:
        """Values of the rows of a call, for the `rows` rows that this site gets.

        Args:
            values: one per row of the call, or one for all.
            rows: of the site's input.
            what: the values in words.

        Raises:
            MissingRouting: it is not known how the call's rows stand in the input.
        """
        number, scope, x = values.shape[0], self.forward.scope, self.forward.input
        if number == 1:
            return values.expand(rows, *values.shape[1:])
        known = x is None or x.rows_known
        if number == rows and known:
            return values
        if known and scope.copies is not None and scope.copies > 1 and number * scope.copies == rows:
            return values.repeat_interleave(scope.copies, dim=0)
        raise MissingRouting(
            f"got {what} for {rows} rows at site {self.site.name!r}: pass one id per row. Where the model itself "
            "repeats, regroups or transposes rows, leave the site out, or call it with rows of one task: task_ids=0"
        )

    def mask(self, x: Float[Tensor, "rows *positions d"]) -> Bool[Tensor, "rows tokens"] | None:
        """Which of the positions of the input `x`, counted through, are real tokens; None when nothing is padding.

        Raises:
            MissingRouting: there is a mask with padding that cannot be laid on the input.
        """
        forward, scope = self.forward, self.forward.scope
        explicit = forward.settings.masks.get(self.site.stream)
        masks = (*(() if explicit is None else (explicit,)), *scope.masks.get(self.site.stream, ()))
        known = forward.input is None or forward.input.rows_known
        if x.dim() < 3 and known and scope.rows in (None, x.shape[0]):
            return None
        if (forward.input is None or (known and forward.input.in_order)) and x.dim() >= 3:
            rows, tokens = x.shape[0], x.shape[1:-1].numel()
            for mask in masks:
                laid: Tensor | None = mask.on(rows, tokens, scope.copies or 1)
                if laid is not None:
                    return laid
        if not masks and scope.unknown_mask is None:
            return None
        if masks and (torch.compiler.is_compiling() or not all(bool(mask.real().all()) for mask in masks)):
            raise MissingRouting(
                f"site {self.site.name!r} gets an input of shape {tuple(x.shape)}, whose positions are not those of "
                f"the padding mask of shape {tuple(masks[0].given.shape)}: leave the site out, or give the mask of "
                "its positions by adapters.route(mask=...)"
            )
        if not masks:
            raise MissingRouting(
                f"site {self.site.name!r} needs the padding mask, and what the call's argument "
                f"{scope.unknown_mask!r} means is not known: give the mask (rows, positions), 1 on real tokens, by "
                "adapters.route(mask=...)"
            )
        return None

    def token_shares(self, x: Float[Tensor, "rows *positions d"]) -> Float[Tensor, "rows tokens"]:
        """`moepeft.ops.linear.token_shares` of the input `x`: the same for all sites of a stream, so made once."""
        values, mask = self.forward.values, self.mask(x)
        key = f"token_shares.{self.site.stream}"
        left = values.get(key)
        if left is not None and left[0] is mask:
            shares: Tensor = left[1]
            rows, tokens = x.shape[0], x.shape[1:-1].numel()
            if shares.shape == (rows, tokens) and shares.dtype == x.dtype and shares.device == x.device:
                return shares
        shares = token_shares(x, mask)
        values[key] = (mask, shares)
        return shares

    @property
    def continues(self) -> bool:
        """Whether this forward continues an earlier one (`Forward.continues`)."""
        return self.forward.continues

    @property
    def recomputes(self) -> bool:
        """Whether the forward is over, and a layer runs again because checkpointing recomputes it during backward."""
        return self.forward.recomputes

    def loss(self, name: str, term: Any) -> None:
        """Record this site's term of an auxiliary loss; a layer that is used several times has a term for each use.

        Args:
            name: of the loss.
            term: what the method's `aux_loss` combines: a tensor, or what it needs to compute all sites' at once.
        """
        terms = self.forward.losses.setdefault(name, {})
        key, uses = self.site.name, 1
        while key in terms:  # the layer is shared, as ALBERT's is by all its blocks
            uses += 1
            key = f"{self.site.name} ({uses})"
        terms[key] = term

    def tally(self, counts: Tensor) -> None:
        """Count for `moepeft.protocols.Stepping.after_step`; nothing unless a training forward is under way.

        The uses of a layer and the forwards of an accumulated batch add up. What checkpointing computes again does not
        count.
        """
        forward = self.forward
        if forward.grad_expected:
            before = forward.counted.get(self.site.name)
            forward.counted[self.site.name] = counts.detach() if before is None else before + counts.detach()

    @property
    def synchronised(self) -> bool:
        """Whether `joint_sum` looks beyond this process (`Runtime.synchronised`)."""
        return self.runtime.synchronised

    def joint_sum(self, value: Tensor) -> Tensor:
        """A sum over the rows of all processes that train together, made from the sum over this one's."""
        return sum_over_processes(value) if self.runtime.synchronised else value

    def put(self, key: str, value: Any) -> None:
        """Leave a value for sites that run later in this forward."""
        self.forward.values[key] = value

    def get(self, key: str) -> Any:
        """A value left by an earlier site of this forward, or None."""
        return self.forward.values.get(key)

    def of_input(self, key: str, x: Tensor, make: Callable[[], T]) -> T:
        """A value made from the input `x`, once for all sites that receive this very tensor, as q, k and v do.

        Told by identity, so that a layer recomputed by checkpointing, whose input is another tensor, makes its own.
        """
        left = self.forward.of_inputs.get(key)
        if left is None or left[0] is not x:
            left = (x, make())
            self.forward.of_inputs[key] = left
        made: T = left[1]
        return made

    def taken(self, key: str) -> Any:
        """What `of_input` made last under that key, and forget it: for the one site that ends its use."""
        return self.forward.of_inputs.pop(key)[1]

    def stat(self, name: str, value: Tensor | Callable[[], Tensor]) -> None:
        """Record a routing statistic; free while nobody asked for them.

        One name means the same in every method: ``gates``, of shape (rows, experts) or (rows, positions, experts), the
        weight of every expert of the site, zero for those that were not chosen; a single row stands for all rows.

        Args:
            name: of the statistic.
            value: the tensor, or what makes it if that costs anything.
        """
        stats = self.forward.settings.stats
        if stats is not None:
            made = value if isinstance(value, Tensor) else value()
            stats.setdefault(self.site.name, {})[name] = made.detach()
