"""`SiteContext`: what an adapter is given beside its input, one layer's view of the forward under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .errors import MissingRouting
from .ops.linear import token_shares
from .ops.processes import sum_over_processes
from .ops.segments import Segments, find_segments
from .ops.views import version_of
from .runtime import OF_MASKS, Forward, Runtime
from .sites import LinearSite

T = TypeVar("T")


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
        """Task of each of `rows` input rows; where the call's rows are packed, a position stands as a row of its own.

        Raises:
            MissingRouting: no ids were given, it is not known which row has which, or a row has several.
        """
        tasks = self.forward.tasks
        if tasks is not None and self.holds(len(tasks), rows):
            return tasks
        ids = self.task_sets(rows)
        if ids.shape[1] != 1:
            raise MissingRouting(
                f"site {self.site.name!r} takes one task per row, got {ids.shape[1]}: give task_ids of shape (rows,), "
                "or (rows, positions) for packed rows"
            )
        return ids[:, 0]

    def task_sets(self, rows: int) -> Int[Tensor, "rows ids"]:
        """Tasks of each of `rows` input rows, padded with -1 for methods that know rows of several tasks.

        Raises:
            MissingRouting: no ids were given, or it is not known which row has which.
        """
        ids, x = self.forward.task_ids, self.forward.input
        if ids is None:
            raise MissingRouting(
                f"site {self.site.name!r} routes by task but the call had no task ids: pass task_ids (one per row) to "
                "the model call, or call it inside `with adapters.route(task_ids=...)`, in the same thread"
            )
        if not self.forward.packed:
            return self.spread(ids[:, 0], rows)
        if x is None or x.positions != ids.shape[1]:
            raise MissingRouting(
                f"site {self.site.name!r} gets {rows} rows of other positions than the task_ids of shape "
                f"{tuple(ids.shape[:2])}, (rows, positions): leave the site out, or give one id per row"
            )
        return self.spread(ids, rows // x.positions).flatten(0, 1)

    def holds(self, number: int, rows: int) -> bool:
        """Whether the `rows` rows of the site's input are the call's `number` rows, one by one."""
        x = self.forward.input
        return number == rows and (x is None or x.rows_known)

    def spread(self, values: Tensor, rows: int, what: str = "task ids") -> Tensor:
        """Values of the rows of a call, for the `rows` rows that this site gets.

        Args:
            values: one per row of the call, or one for all.
            rows: of the site's input.
            what: the values in words.

        Raises:
            MissingRouting: it is not known how the call's rows stand in the input.
        """
        number = values.shape[0]
        if self.holds(number, rows):
            return values
        if number == 1:
            return values.expand(rows, *values.shape[1:])
        scope, x = self.forward.scope, self.forward.input
        known = x is None or x.rows_known
        if known and scope.copies is not None and scope.copies > 1 and number * scope.copies == rows:
            return values.repeat_interleave(scope.copies, dim=0)
        if x is not None and number == rows and x.x.shape[:2] == (rows, rows):
            raise MissingRouting(
                f"site {self.site.name!r} gets as many positions as rows, {rows}, and nothing tells which come first: "
                "give a batch of another number of rows, or of another length"
            )
        raise MissingRouting(
            f"got {number} {what} for {rows} rows at site {self.site.name!r}: pass one id per row. Where the model "
            "itself repeats, regroups or transposes rows, leave the site out, or call it with rows of one task: "
            "task_ids=0"
        )

    def mask(self, x: Float[Tensor, "rows *positions d"], *, given: bool = False) -> Bool[Tensor, "rows tokens"] | None:
        """Which of the positions of the input `x`, counted through, are real tokens; None when nothing is padding.

        Args:
            x: the input.
            given: ask the mask of `Attachment.route` alone, and not the padding of the call.

        Raises:
            MissingRouting: there is a mask with padding that cannot be laid on the input.
        """
        forward, scope = self.forward, self.forward.scope
        explicit = forward.settings.masks.get(self.site.stream)
        known_of_call = () if given else scope.masks.get(self.site.stream, ())
        masks = (*(() if explicit is None else (explicit,)), *known_of_call)
        unknown = None if given else scope.unknown_mask
        known = forward.input is None or forward.input.rows_known
        positions = None if forward.input is None else forward.input.positions
        if positions is None and x.dim() < 3 and known and scope.rows in (None, x.shape[0]):
            return None
        if (forward.input is None or (known and forward.input.in_order)) and (x.dim() >= 3 or positions):
            rows, tokens = x.shape[0] // (positions or 1), positions or x.shape[1:-1].numel()
            if tokens == scope.learned and explicit is None:
                masks = tuple(mask for mask in masks if mask.given.shape[-1] == tokens)  # whose positions, who knows
            else:
                for mask in masks:
                    laid: Tensor | None = mask.on(rows, tokens, scope.copies or 1)
                    if laid is not None:
                        return laid if positions is None else laid.reshape(x.shape[0], -1)
        if not masks and unknown is None:
            return None
        if masks and (torch.compiler.is_compiling() or not all(bool(mask.real().all()) for mask in masks)):
            raise MissingRouting(
                f"site {self.site.name!r} gets an input of shape {tuple(x.shape)}, whose positions are not those of "
                f"the padding mask of shape {tuple(masks[0].given.shape)}: leave the site out, or give the mask of "
                "its positions by adapters.route(mask=...)"
            )
        if unknown is not None and unknown.tells_apart():
            raise MissingRouting(
                f"site {self.site.name!r} needs the padding mask, and what the call's argument "
                f"{unknown.name!r} means is not known: give the mask (rows, positions), 1 on real tokens, "
                "by adapters.route(mask=...)"
            )
        return None

    def segments(self, x: Float[Tensor, "rows *positions d"]) -> Segments | None:
        """The sequences that stand in packed rows, of which every position is a row of `x`; None where rows are whole.

        Raises:
            MissingRouting: the call says nothing of where the sequences begin.
        """
        ids, arranged = self.forward.task_ids, self.forward.input
        if ids is None or arranged is None or arranged.positions is None:
            return None
        made: Segments | None = self.get("segments")
        if made is None:
            begins = self.get("position_ids")
            if begins is None:
                raise MissingRouting(
                    "the rows are packed, and a loss over sequences cannot tell where they begin: pass position_ids "
                    "(rows, positions), counted from 0 in every sequence, to the model call"
                )
            tokens = x.shape[0] // arranged.positions, arranged.positions
            mask = self.mask(x)
            real = None if mask is None else mask.view(tokens)
            made = find_segments(begins.to(x.device).expand(tokens), ids[..., 0].expand(tokens), real)
            self.put("segments", made)
        return made

    def token_shares(self, x: Float[Tensor, "rows *positions d"]) -> Float[Tensor, "rows tokens"]:
        """`moepeft.ops.linear.token_shares` of the input `x`: the same for all sites of a stream, so made once."""
        values, mask = self.forward.values, self.mask(x)
        key = f"{OF_MASKS}{self.site.stream}.{x.dtype}"
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
        """Whether this forward continues an earlier one; a static cache's device may have to be asked."""
        return bool(self.forward.goes_on)

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

    @property
    def prepared(self) -> Any:
        """What `moepeft.protocols.Preparing.prepare` made for this site; None where the adapter makes its own."""
        forward = self.forward
        if torch.compiler.is_compiling() or (forward.grad and not torch.is_grad_enabled()):
            return None  # reentrant checkpointing: the second run would find no way back to the parameters
        return forward.prepared.get(self.site.name)

    def of_input(self, key: str, x: Tensor, make: Callable[[], T]) -> T:
        """A value made from the input `x`, once for all sites that receive this very tensor, as q, k and v do.

        Told by identity, so that a layer recomputed by checkpointing, whose input is another tensor, makes its own. And
        by version, since the model may change the tensor in place. A tensor of inference mode has none, and its value
        is made for every site.
        """
        version = version_of(x)
        left = self.forward.of_inputs.get(key)
        if left is None or left[0] is not x or left[1] is None or left[1] != version:
            left = (x, version, make())
            self.forward.of_inputs[key] = left
        made: T = left[2]
        return made

    def taken(self, key: str) -> Any:
        """What `of_input` made last under that key, and forget it: for the one site that ends its use."""
        return self.forward.of_inputs.pop(key)[2]

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
            positions = None if self.forward.input is None else self.forward.input.positions
            if positions is not None:
                made = made.reshape(-1, positions, *made.shape[1:])
            stats.setdefault(self.site.name, {})[name] = made.detach()
