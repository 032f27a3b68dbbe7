"""`Attachment`: the handle on a model's adapters. A facade: the work is done by functions that take its `State`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import building, heads, hub, merging, saving, trained
from .counting import ParameterCount, count_parameters, summarise
from .errors import Unsupported
from .given import checked_ids, checked_masks
from .groups import parameter_groups
from .growing import add_tasks
from .hooks import leave
from .losses import aux_losses
from .protocols import AdapterFactory
from .runtime import Runtime
from .sites import LinearSite
from .state import State, states_of
from .stepping import after_step


class Attachment:
    """Handle on the adapters of one model. Made by `attach`, `load`, and `attachment` for a copied model.

    Attributes:
        model: the adapted model. All state lives in it; the handle has none.
    """

    def __init__(self, model: nn.Module, number: int) -> None:
        self.model = model
        self._number = number

    @property
    def state(self) -> State:
        """What the attachment is made of.

        Raises:
            Unsupported: the adapters were taken off.
        """
        for state in states_of(self.model):
            if state.number == self._number:
                return state
        raise Unsupported("these adapters were detached: call attach() or load() for new ones")

    @property
    def factory(self) -> AdapterFactory:
        """The method's configuration."""
        return self.state.factory

    @property
    def sites(self) -> tuple[LinearSite, ...]:
        """The adapted layers, in registration order."""
        return self.state.sites

    # ------------------------------------------------------------------ parameters

    @property
    def runtime(self) -> Runtime:
        """What this thread's forwards know."""
        return self.state.runtime

    @property
    def shared(self) -> nn.Module | None:
        """The module all sites own together, if the method has one."""
        return self.state.shared

    @property
    def adapters(self) -> Mapping[str, nn.Module]:
        """The adapter of every site, by site name."""
        return self.state.adapters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What trains, each once, under the names `save` uses: shared ones, every site's, then the model's own."""
        yield from ((name, parameter) for name, parameter in self.state.named_parameters() if parameter.requires_grad)
        yield from trained.find_others(self.state).items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """What trains, for the optimiser: adapters, and what of the model `attach` was told by `train`."""
        return (parameter for _, parameter in self.named_parameters())

    def parameter_groups(self, **options: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What trains, in groups by purpose, as torch's optimisers take them.

        ``torch.optim.AdamW(adapters.parameter_groups(router={"lr": 1e-4}, heads={"weight_decay": 0.1}), lr=1e-3)``

        Args:
            options: of the optimiser, by group: ``experts`` (low-rank factors, kernels and the like), ``router``,
                ``task_tables``, ``heads`` (what trains beside the adapters).

        Returns:
            The groups that have parameters, each with its ``name``; together they are `parameters`, each once.

        Raises:
            ConfigError: there is no group of that name.
        """
        return parameter_groups(self.state, options)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the adapters hold, buffers included, under names free of the model's own."""
        return self.state.values()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` gave. Names and shapes must agree exactly, and the adapters must not be merged."""
        self.state.load_values(state)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the adapters anew and in place, as `attach` did: parameters, buffers and constants.

        A model made on the meta device needs it once `to_empty` has given it memory, before values are loaded.

        Raises:
            Unsupported: an adapted layer is on the meta device still.
        """
        building.reset(self.state)
        heads.restart(self.state)

    def parameter_count(self) -> ParameterCount:
        """Trainable numbers, measured on the modules and by the method's closed form."""
        return count_parameters(self.state)

    def summary(self) -> str:
        """A few lines for a person: method, sites by role, parameters, and what was left out and why."""
        return summarise(self.state)

    # ------------------------------------------------------------------ losses and routing

    def aux_losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the last forward by name, coefficients included.

        Raises:
            AuxLossDetached: the model trains but a loss has no gradient, as under reentrant checkpointing.
        """
        return aux_losses(self.state)

    def aux_loss(self) -> Tensor:
        """Sum of `aux_losses`, to be added to the task loss; a zero without graph when the method has none."""
        losses = list(self.aux_losses().values())
        if losses:
            return losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        return torch.zeros((), device=self.state.device)

    def after_step(self) -> None:
        """Tell the adapters that the optimiser has stepped; call it after every ``optimiser.step()``.

        Methods that balance their experts without a loss (SMoRA, FlyLoRA) need it, and refuse to train on without.
        Others ignore it. With several processes all must call it. Accumulated batches, of which only the last is
        followed by a step, count together.
        """
        after_step(self.state)

    @contextmanager
    def route(
        self,
        *,
        task_ids: Tensor | Sequence[int] | int | None = None,
        mask: Tensor | Mapping[str, Tensor] | None = None,
    ) -> Iterator[None]:
        """Route every call inside by these ids, in this thread; for `generate`, whose keywords are fixed.

        Args:
            task_ids: one id per row, a single one for all rows, or (rows, positions) for packed rows.
            mask: which positions are real tokens, (rows, positions), for models that name their mask otherwise; for
                an encoder-decoder model a dictionary of masks by ``encoder`` and ``decoder``.

        Raises:
            MissingRouting: ids or mask are not what they should be.
        """
        changes: dict[str, Any] = {}
        if task_ids is not None:
            changes["task_ids"] = checked_ids(self.state, task_ids).to(self.state.device)
        if mask is not None:
            changes["masks"] = checked_masks(mask)
        with self.runtime.changed(**changes):
            yield

    def synchronise(self, wanted: bool = True) -> None:
        """Let data-parallel processes train as one process with their joint batch.

        Without it a balance loss (MixLoRA) and routing by batch (TuckA) see the rows of their own process only: the
        gradients are the mean over the processes' batches, as with accumulation. With it every training forward
        exchanges some numbers between the processes, so all must make the same number of them; evaluation does not.
        """
        self.runtime.synchronised = wanted

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes bit for bit what it computes without adapters."""
        with merging.bare_weights(self.state), self.runtime.changed(enabled=False):
            yield

    @contextmanager
    def recording(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        """Collect routing statistics: site name -> name -> tensor of the last forward inside."""
        stats: dict[str, dict[str, Tensor]] = {}
        with self.runtime.changed(stats=stats):
            yield stats

    # ------------------------------------------------------------------ merging, saving, leaving

    def merge(self, *, task: int | None = None, keep: bool = True) -> None:
        """Fold the update into the base weights; the adapters rest until `unmerge`.

        Args:
            task: which task's update; needed by methods that route by task, refused by those that do not.
            keep: False saves the second copy of the adapted weights: `unmerge` and `disabled` are refused then.

        Raises:
            NotMergeable: the update depends on the input, a weight is no matrix of known numbers, or the result is
                not finite.
        """
        merging.merge(self.state, task, keep=keep)

    def merge_and_detach(self, *, task: int | None = None) -> nn.Module:
        """The model itself with the update in its weights: its own modules and keys, and nothing of this library.

        ``save_pretrained`` then writes a checkpoint that transformers reads alone. What trained beside the adapters
        keeps its values.

        Args:
            task: as `merge` takes it; adapters that are merged already leave as they are.

        Raises:
            NotMergeable: as `merge` raises it; nothing was changed.
        """
        merging.merge_and_detach(self.state, task)
        return self.model

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit, and the adapters to work.

        Raises:
            NotMergeable: nothing is merged, or ``merge(keep=False)`` kept no weights.
        """
        merging.unmerge(self.state)

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the base weights at present."""
        return self.state.merged

    def save(self, folder: str | Path) -> None:
        """Write ``adapter.safetensors`` and ``adapter.json`` into `folder`, which is made if need be.

        ``trained.safetensors`` holds what else of the model trains, such as a new head.

        Where parameters are sharded (FSDP) every process must call it: each gathers and writes all of them.
        """
        saving.save(self.state, Path(folder))

    def restore(self, folder: str | Path, *, any_base: bool = False) -> None:
        """Give the adapters the values that `save` wrote of others of the same method, configuration and sites.

        The modules stay, and so do the optimisers and wrappers that hold their parameters, sharded ones included
        (FSDP), where every process must call it.

        Args:
            folder: where `save` wrote.
            any_base: accept adapters of a base with other weights, of the same class.

        Raises:
            AdapterFileError: the files are damaged or for other adapters; nothing was changed.
            NotMergeable: the adapters are merged.
        """
        saving.restore(self.state, Path(folder), any_base=any_base)

    def switch(self, folder: str | Path, *, any_base: bool = False) -> None:
        """Serve other trained adapters of the same method, configuration and sites: their values replace these.

        Merged adapters are merged again, with the new values and for the same task. On an error all is as it was.

        Raises:
            AdapterFileError: the files are damaged or for other adapters.
            NotMergeable: the adapters were merged with ``keep=False``.
        """
        with merging.unmerged(self.state):
            self.restore(folder, any_base=any_base)

    def add_tasks(self, number: int) -> None:
        """Make room for `number` more tasks, after those that there are.

        Nothing changes for the old tasks. A new task begins as one does after `attach`: with drawn rows in the task
        tables, beside the trained experts. Parameters that grew are new ones, so make the optimiser anew.

        Raises:
            Unsupported: the method knows no tasks, the adapters are merged, or they are sharded.
        """
        add_tasks(self.state, number)

    def push_to_hub(
        self, repo_id: str, *, tasks: Sequence[str] = (), record: Mapping[str, Any] | None = None, private: bool = False
    ) -> str:
        """Send what `save` writes to the hub, with a card: method, source of its equations, base, tasks, scores.

        Args:
            repo_id: ``owner/name``; made if need be. `moepeft.load` takes it.
            tasks: names of the tasks in the order of their ids.
            record: a run's record, as the benchmark's JSON file holds it: its scores go into the card.
            private: whether a new repository is private.

        Returns:
            The address of the commit.
        """
        return hub.push(self.state, repo_id, tasks, record, private)

    def detach(self) -> nn.Module:
        """Take the adapters off; the model is exactly what it was before `attach`."""
        if self.merged:
            self.unmerge()
        leave(self.state)
        return self.model
