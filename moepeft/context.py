"""What one forward pass knows: the tasks of its rows, its padding masks, and what the adapters recorded.

One `Runtime` belongs to one attached model; it is plain data reached through the model's modules, never a global and
never a closure, so a deep copy or a pickle of the model takes its own along. Each site reads it through its
`SiteContext`. The values stay until the next forward begins: gradient checkpointing recomputes layers during backward
and must see what the forward saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .errors import MissingRouting
from .ops.linear import token_shares
from .ops.processes import sum_over_processes
from .roles import Stream
from .sites import LinearSite

T = TypeVar("T")


@dataclass
class Runtime:
    """State of one attached model.

    Attributes:
        enabled: False inside `Attachment.disabled`.
        routed: task ids set by `Attachment.route`; those given to the call itself win.
        task_ids: task ids of the current forward, shape (rows,), or (rows, k) for rows of several tasks.
        masks: padding mask of each stream, shape (rows, positions), nonzero on real tokens.
        begun_by: the module whose call is under way, None between calls.
        continues: the current call continues an earlier one (cached decoding, decoder after a separate encoder call).
        grad_expected: whether autograd was on and the model training when the current forward began.
        losses: loss name -> site name, numbered from its second use on -> term, as `AdapterFactory.aux_loss` takes it.
        values: what sites tell each other within a forward, by key.
        of_inputs: what sites made of an input that others receive as well, by key, beside that input.
        stats: site name -> routing statistics, filled only while `recording`.
        recording: statistics are wanted.
        synchronised: what methods compute across rows they compute across all processes' rows (`joint_sum`).
        counted: site name -> what the site counted in the current training forward.
        tallies: site name -> the sum of what it counted in the forwards before, since the last optimiser step.
    """

    enabled: bool = True
    routed: Tensor | None = None
    task_ids: Tensor | None = None
    masks: dict[Stream, Tensor | None] = field(default_factory=dict)
    begun_by: nn.Module | None = None
    continues: bool = False
    grad_expected: bool = False
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    of_inputs: dict[str, tuple[Tensor, Any]] = field(default_factory=dict)
    stats: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    recording: bool = False
    synchronised: bool = False
    counted: dict[str, Tensor] = field(default_factory=dict)
    tallies: dict[str, Tensor] = field(default_factory=dict)

    def begin(
        self, task_ids: Tensor | None, masks: dict[Stream, Tensor | None], *, continues: bool, training: bool
    ) -> None:
        """Start a forward pass: forget the last one, unless this call continues it."""
        self.task_ids = task_ids if task_ids is not None else self.routed
        self.masks = masks
        self.continues = continues
        self.grad_expected = training and torch.is_grad_enabled()
        self.losses = {}
        if not continues:
            self.values = {}
            self._settle()

    def take_tallies(self) -> dict[str, Tensor]:
        """The tallies since they were last taken, by site."""
        self._settle()
        taken, self.tallies = self.tallies, {}
        return taken

    def _settle(self) -> None:
        """Add what the last forward counted to the tallies. Until then a recomputation may overwrite the counts."""
        for site, counts in self.counted.items():
            self.tallies[site] = self.tallies[site] + counts if site in self.tallies else counts
        self.counted = {}

    def end(self) -> None:
        """The forward is over, however it ended: no layer receives an input of it again.

        What was made of its last inputs would take memory until the next one. What else it knew stays: checkpointing
        recomputes during backward.
        """
        self.begun_by = None
        self.of_inputs = {}

    def __getstate__(self) -> dict[str, Any]:
        # Activations of the last forward carry graphs, which neither pickle nor deepcopy; they are nobody's state.
        kept = self.__dict__.copy()
        kept.update(
            task_ids=None, masks={}, losses={}, values={}, of_inputs={}, stats={}, continues=False, begun_by=None
        )
        return kept


@dataclass
class SiteContext:
    """One site's view of the `Runtime`."""

    runtime: Runtime
    site: LinearSite

    def beside_the_rows(self) -> SiteContext:
        """The same site for an input that is no row of the batch, such as DeBERTa's table of relative positions.

        No mask and no tasks belong to such an input, and what an adapter records of it is nobody's.
        """
        return SiteContext(Runtime(), self.site)

    def tasks(self, rows: int) -> Int[Tensor, "rows"]:
        """Task of each of `rows` input rows.

        Raises:
            MissingRouting: no ids were given, their number does not divide `rows`, or a row has several.
        """
        ids = self.task_sets(rows)
        if ids.shape[1] != 1:
            raise MissingRouting(
                f"site {self.site.name!r} takes one task per row, got task_ids of shape {tuple(ids.shape)}"
            )
        return ids[:, 0]

    def task_sets(self, rows: int) -> Int[Tensor, "rows ids"]:
        """Tasks of each of `rows` input rows, padded with -1 for methods that know rows of several tasks.

        Beam search and models that flatten positions into the batch repeat every row in place; so do the ids.

        Raises:
            MissingRouting: no ids were given, or their number does not divide `rows`.
        """
        ids = self.runtime.task_ids
        if ids is None:
            raise MissingRouting(
                f"site {self.site.name!r} routes by task but the call had no task ids: pass task_ids (one per row) to "
                "the model call, or call it inside `with adapters.route(task_ids=...)`"
            )
        if rows % ids.shape[0]:
            raise MissingRouting(
                f"got {ids.shape[0]} task ids for {rows} rows at site {self.site.name!r}: pass one id per row"
            )
        ids = ids.unsqueeze(1) if ids.dim() == 1 else ids
        return ids if ids.shape[0] == rows else ids.repeat_interleave(rows // ids.shape[0], dim=0)

    def mask(self, x: Float[Tensor, "rows *positions d"]) -> Bool[Tensor, "rows tokens"] | None:
        """Which of the positions of the input `x`, counted through, are real tokens; None when nothing is padding.

        Under a key-value cache the mask covers the past as well: its last columns belong to `x`.

        Raises:
            MissingRouting: the mask fits the input neither way.
        """
        mask = self.runtime.masks.get(self.site.stream)
        if mask is None or x.dim() < 3:
            return None
        tokens = x.shape[1:-1].numel()
        if mask.dim() != 2 or mask.shape[1] < tokens or x.shape[0] % mask.shape[0]:
            raise MissingRouting(
                f"site {self.site.name!r} needs a padding mask of shape (rows, positions) for an input of shape "
                f"{tuple(x.shape)}, got attention_mask of shape {tuple(mask.shape)}"
            )
        mask = mask[:, mask.shape[1] - tokens :].bool()
        return mask if mask.shape[0] == x.shape[0] else mask.repeat_interleave(x.shape[0] // mask.shape[0], dim=0)

    def token_shares(self, x: Float[Tensor, "rows *positions d"]) -> Float[Tensor, "rows tokens"]:
        """`moepeft.ops.linear.token_shares` of the input `x`: the same for all sites of a stream, so made once."""
        key, mask = f"token_shares.{self.site.stream}", self.runtime.masks.get(self.site.stream)
        left = self.runtime.values.get(key)
        if left is not None and left[0] is mask:
            shares: Tensor = left[1]
            rows, tokens = x.shape[0], x.shape[1:-1].numel()
            if shares.shape == (rows, tokens) and shares.dtype == x.dtype and shares.device == x.device:
                return shares
        shares = token_shares(x, self.mask(x))
        self.runtime.values[key] = (mask, shares)
        return shares

    @property
    def continues(self) -> bool:
        """Whether this forward continues an earlier one (`Runtime.continues`)."""
        return self.runtime.continues

    @property
    def recomputes(self) -> bool:
        """Whether the forward is over, and a layer runs again because checkpointing recomputes it during backward."""
        return self.runtime.begun_by is None

    def loss(self, name: str, term: Any) -> None:
        """Record this site's term of an auxiliary loss: one for every use in a forward, none for a recomputation.

        Args:
            name: of the loss.
            term: what the method's `aux_loss` combines: a tensor, or what it needs to compute all sites' at once.
        """
        terms, key, uses = self.runtime.losses.setdefault(name, {}), self.site.name, 1
        while key in terms and not self.recomputes:  # the layer is shared, as ALBERT's is by all its blocks
            uses += 1
            key = f"{self.site.name} ({uses})"
        terms[key] = term

    def tally(self, counts: Tensor) -> None:
        """Count for `moepeft.protocols.Stepping.after_step`; nothing unless a training forward is under way.

        Keyed by site, so a recomputation (gradient checkpointing) overwrites the counts instead of doubling them. The
        forwards of an accumulated batch add up.
        """
        if self.runtime.grad_expected:
            self.runtime.counted[self.site.name] = counts.detach()

    @property
    def synchronised(self) -> bool:
        """Whether `joint_sum` looks beyond this process (`Runtime.synchronised`)."""
        return self.runtime.synchronised

    def joint_sum(self, value: Tensor) -> Tensor:
        """A sum over the rows of all processes that train together, made from the sum over this one's."""
        return sum_over_processes(value) if self.runtime.synchronised else value

    def put(self, key: str, value: Any) -> None:
        """Leave a value for sites that run later in this forward."""
        self.runtime.values[key] = value

    def get(self, key: str) -> Any:
        """A value left by an earlier site of this forward, or None."""
        return self.runtime.values.get(key)

    def of_input(self, key: str, x: Tensor, make: Callable[[], T]) -> T:
        """A value made from the input `x`, once for all sites that receive this very tensor, as q, k and v do.

        Told by identity, so that a layer recomputed by checkpointing, whose input is another tensor, makes its own.
        """
        left = self.runtime.of_inputs.get(key)
        if left is None or left[0] is not x:
            left = (x, make())
            self.runtime.of_inputs[key] = left
        made: T = left[1]
        return made

    def taken(self, key: str) -> Any:
        """What `of_input` made last under that key, and forget it: for the one site that ends its use."""
        return self.runtime.of_inputs.pop(key)[1]

    def stat(self, name: str, value: Tensor | Callable[[], Tensor]) -> None:
        """Record a routing statistic; free while nobody asked for them.

        One name means the same in every method: ``gates``, of shape (rows, experts) or (rows, positions, experts), the
        weight of every expert of the site, zero for those that were not chosen; a single row stands for all rows.

        Args:
            name: of the statistic.
            value: the tensor, or what makes it if that costs anything.
        """
        if self.runtime.recording:
            made = value if isinstance(value, Tensor) else value()
            self.runtime.stats.setdefault(self.site.name, {})[name] = made.detach()
