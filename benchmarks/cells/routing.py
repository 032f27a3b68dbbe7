"""How a trained method routes: which experts each task uses at each site, and where its task embeddings went.

It reads what adapters record under ``gates`` (`moepeft.context.SiteContext.stat`), and the parameters of which the
method says that they hold a row per task (`moepeft.config.purpose`). It knows no method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cells.data import TokenisedTask
from benchmarks.families import AnyFamily, AnyModel
from benchmarks.families.batch import Batch, Row
from benchmarks.records.schema import EmbeddingMap, Routing, SiteRouting, TaskEmbeddings
from moepeft import Attachment
from moepeft.config import purpose
from moepeft.context import SiteContext
from moepeft.protocols import LinearSite

ROWS = 64
"""Evaluation rows per task that are looked at."""

BATCH_ROWS = 16
"""Rows per forward pass: what is routed once per batch is then seen a few times."""

DIGITS = 4
"""Significant digits that are kept."""

GATES = "gates"


@dataclass(frozen=True, slots=True)
class _Choices:
    """What the choices of one site for one task add up to.

    Attributes:
        weights: sum of the gates, shape (experts,).
        chosen: how often each expert had a weight, shape (experts,).
        entropy: sum of the entropies of single choices, in nats.
        number: of choices: tokens, rows or batches.
    """

    weights: Tensor
    chosen: Tensor
    entropy: Tensor
    number: int

    @classmethod
    def of(cls, gates: Tensor) -> _Choices:
        """Of the gates of one forward pass, shape (choices, experts)."""
        gates = gates.double()
        # Gates need not add up to one: their entropy is that of their proportions.
        entropy = torch.special.entr(gates / gates.sum(-1, keepdim=True).clamp(min=1e-300)).sum()
        return cls(gates.sum(0), (gates > 0).sum(0), entropy, len(gates))

    def __add__(self, other: _Choices) -> _Choices:
        return _Choices(
            self.weights + other.weights,
            self.chosen + other.chosen,
            self.entropy + other.entropy,
            self.number + other.number,
        )


def collect(model: AnyModel, tasks: Sequence[TokenisedTask], family: AnyFamily, *, autocast: bool) -> Routing | None:
    """Routing of the first `ROWS` evaluation rows of every task; None for what records neither gates nor embeddings.

    Where answers are text the rows carry their right answers, as in training.

    Args:
        model: with its adapters, in the mode it is in.
        tasks: in the order of the protocol, which is that of the task ids.
        family: makes the batches, each of rows of one task.
        autocast: whether the forward runs in bfloat16.
    """
    attachment = model.attachment
    if not isinstance(attachment, Attachment):
        return None
    choices: dict[tuple[str, int], _Choices] = {}
    for task, rows in _batches(tasks):
        for site, seen in _look(model, attachment, family.training_batch(rows), autocast=autocast):
            key = site.name, task
            choices[key] = choices[key] + seen if key in choices else seen
    embeddings = _embeddings(attachment, len(tasks))
    if not choices and embeddings is None:
        return None
    by_site = [(site, [choices.get((site.name, task)) for task in range(len(tasks))]) for site in attachment.sites]
    return Routing(
        tasks=[task.spec.name for task in tasks],
        rows={task.spec.name: min(ROWS, len(task.validation)) for task in tasks},
        batch_rows=BATCH_ROWS,
        sites=[_site_routing(site, [one for one in found if one is not None]) for site, found in by_site if all(found)],
        embeddings=embeddings,
    )


def _look(
    model: AnyModel, attachment: Attachment, batch: Batch, *, autocast: bool
) -> list[tuple[LinearSite, _Choices]]:
    """What every site that records gates has chosen in one forward pass."""
    device = next(model.parameters()).device
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast),
        attachment.recording() as stats,
    ):
        model(batch.to(device))
        return [
            (site, _Choices.of(_of_real_tokens(attachment, site, stats[site.name][GATES])))
            for site in attachment.sites
            if GATES in stats.get(site.name, {})
        ]


def _batches(tasks: Sequence[TokenisedTask]) -> Iterator[tuple[int, list[tuple[int, Row]]]]:
    for position, task in enumerate(tasks):
        rows = [(position, row) for row in task.validation[:ROWS]]
        for start in range(0, len(rows), BATCH_ROWS):
            yield position, rows[start : start + BATCH_ROWS]


def _of_real_tokens(attachment: Attachment, site: LinearSite, gates: Tensor) -> Tensor:
    """Gates of shape (choices, experts): of rows, or of tokens without padding."""
    if attachment.factory.capabilities.routing != "token":
        return gates.flatten(0, -2)  # of rows, or one for the whole batch
    mask = SiteContext(attachment.runtime, site).mask(gates)
    return gates.flatten(0, -2) if mask is None else gates[mask]


def _site_routing(site: LinearSite, choices: Sequence[_Choices]) -> SiteRouting:
    return SiteRouting(
        site=site.name,
        role=site.role,
        layer=site.layer,
        weights=[_rounded(one.weights / one.number) for one in choices],
        shares=[_rounded(one.chosen / one.chosen.sum().clamp(min=1)) for one in choices],
        entropy=_rounded(torch.stack([one.entropy / one.number for one in choices])),
    )


# ---------------------------------------------------------------------- task embeddings


def _embeddings(attachment: Attachment, tasks: int) -> TaskEmbeddings | None:
    """What the tables of shape (tasks, width) say; tables of a matrix per task are no embeddings."""
    tables = [
        (name.rpartition(".")[0].removeprefix("sites."), parameter.detach().double().cpu())
        for name, parameter in attachment.named_parameters()
        if purpose(attachment.factory, name) == "task_table" and parameter.dim() == 2 and len(parameter) == tasks
    ]
    if not tables:
        return None
    cosine = torch.stack([cosines(table) for _, table in tables]).mean(0)
    shown = dict.fromkeys((0, (len(tables) - 1) // 2, len(tables) - 1))
    return TaskEmbeddings(
        cosine=[_rounded(row) for row in cosine], maps=[embedding_map(*tables[position]) for position in shown]
    )


def cosines(table: Tensor) -> Tensor:
    """Cosine between the rows of a table: (tasks, width) -> (tasks, tasks)."""
    unit = F.normalize(table, dim=-1)
    return unit @ unit.T


def embedding_map(site: str, table: Tensor) -> EmbeddingMap:
    """The rows of a table (tasks, width) on their first two principal components; missing ones are zero.

    The sign of a component is free: it is chosen so that its largest coordinate is positive.
    """
    centred = table - table.mean(0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    points = torch.zeros(len(table), 2, dtype=table.dtype)
    explained = torch.zeros(2, dtype=table.dtype)
    kept = min(2, len(singular))
    points[:, :kept] = (left * singular)[:, :kept]
    largest = points.gather(0, points.abs().argmax(0, keepdim=True))
    points *= torch.where(largest < 0, -1.0, 1.0)
    explained[:kept] = (singular.square() / singular.square().sum().clamp(min=1e-300))[:kept]
    return EmbeddingMap(site=site, points=[_rounded(row) for row in points], explained=_rounded(explained))


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
