"""Arithmetic that several methods route by. Pure functions on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def top_k_gates(logits: Float[Tensor, "*n experts"], k: int) -> Float[Tensor, "*n experts"]:
    """Softmax over the `k` largest logits, zero elsewhere: dense, so that no step gathers by expert.

    Ties are cut as `torch.topk` cuts them, so that exactly `k` gates are open.
    """
    chosen = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, chosen.indices, chosen.values.softmax(dim=-1))


def per_row(weight: Tensor, x: Tensor) -> Tensor:
    """View a weight of shape (rows, n) so that it multiplies features of `x` (rows, ..., n) row by row."""
    return weight.reshape(weight.shape[0], *(1,) * (x.dim() - 2), weight.shape[-1]).to(x.dtype)


def add_linear(
    y: Float[Tensor, "*n o"], x: Float[Tensor, "*m k"], weight: Float[Tensor, "o k"], scale: float | None = None
) -> Float[Tensor, "*m o"]:
    """y plus `scale` times the linear map of x, in y's type.

    In place on what the product makes, to the last bit what sums in tensors of their own would be; those take longer.
    """
    update = F.linear(x, weight.to(x.dtype))
    update = update if scale is None else update.mul_(scale)
    return update.to(y.dtype).add_(y)


def unit(x: Float[Tensor, "*n"], first: int = 0) -> Float[Tensor, "*n"]:
    """x over its Euclidean norm, taken over the dimensions from `first` on."""
    scaled: Tensor = _Unit.apply(x, tuple(range(first, x.dim())))  # type: ignore[no-untyped-call]
    return scaled


class _Unit(torch.autograd.Function):
    """A third of the kernels of autograd's backward of a norm and a division."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
        scaled: Tensor = x / norm
        ctx.save_for_backward(scaled, norm)
        ctx.dims = dims
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        scaled, norm = ctx.saved_tensors
        along = (gradient * scaled).sum(dim=ctx.dims, keepdim=True)
        return torch.addcmul(gradient, scaled, along, value=-1) / norm, None


def token_shares(
    x: Float[Tensor, "rows *positions d"], mask: Bool[Tensor, "rows tokens"] | None
) -> Float[Tensor, "rows tokens"]:
    """Each token's weight in the mean of its row's real ones; a row of padding alone has zeros."""
    if mask is None:
        tokens = x.shape[1:-1].numel()
        return x.new_full((x.shape[0], tokens), 1 / max(1, tokens))
    weight = mask.to(x.dtype)
    return weight / weight.sum(dim=1, keepdim=True).clamp(min=1)


def with_row_mean(
    x: Float[Tensor, "rows *positions d"], shares: Float[Tensor, "rows tokens"]
) -> tuple[Float[Tensor, "rows *positions d"], Float[Tensor, "rows d"]]:
    """Mean of each row over its positions, weighted by `token_shares`; a row without positions is its own.

    Returns:
        x, for whatever else reads it, and the mean: both gradients are put together in one pass.
    """
    if x.dim() == 2:
        return x, x
    same, mean = _WithWeightedSum.apply(x, shares)  # type: ignore[no-untyped-call]
    return same, mean


class _WithWeightedSum(torch.autograd.Function):
    """Sum of each row's tokens, weighted. Autograd's own backward is a product with one inner index: slow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        return x, (weight.unsqueeze(1) @ x.flatten(1, -2)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_x: Tensor, of_sum: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return torch.addcmul(of_x.flatten(1, -2), weight.unsqueeze(2), of_sum.unsqueeze(1)).reshape(of_x.shape), None


def first_position(x: Float[Tensor, "rows *positions d"]) -> Float[Tensor, "rows d"]:
    """Each row's features at position 0."""
    return x if x.dim() == 2 else x.flatten(1, -2)[:, 0]


class ContrastiveTerm(NamedTuple):
    """What a site gives to the contrastive loss of a forward.

    Attributes:
        summary: of each row.
        table: task embeddings.
        tasks: of the rows.
    """

    summary: Float[Tensor, "rows d"]
    table: Float[Tensor, "tasks d"]
    tasks: Int[Tensor, "rows"]


def contrastive_task_loss(terms: Sequence[ContrastiveTerm], temperature: float) -> Float[Tensor, ""]:
    """Cross entropy over tasks of the cosine between a row's summary and each task embedding, over `temperature`.

    The mean over rows, then over sites. Sites of one shape are computed together: one by one, dozens of kernels on
    tensors this small would cost more than what they compute.

    Args:
        terms: of all sites of one forward, whose rows have the same tasks.
        temperature: what cosines are divided by.
    """
    alike: dict[Any, list[ContrastiveTerm]] = {}
    for term in terms:
        alike.setdefault(tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in term[:2]), []).append(term)
    sums = []
    for group in alike.values():
        summaries, tables = torch.stack([term.summary for term in group]), torch.stack([term.table for term in group])
        wide = torch.promote_types(tables.dtype, torch.float32)
        with torch.autocast(device_type=tables.device.type, enabled=False):
            # This way round the tables' gradients come in the order of the tables.
            cosines = (F.normalize(tables.to(wide), dim=-1) @ F.normalize(summaries.to(wide), dim=-1).mT).mT
            tasks = group[0].tasks.repeat(len(group))
            losses = F.cross_entropy((cosines / temperature).flatten(0, 1), tasks, reduction="sum")
        sums.append(losses / len(group[0].tasks))
    return torch.stack(sums).sum() / len(terms)


def load_counts(
    probabilities: Float[Tensor, "rows *positions experts"],
    choices: Int[Tensor, "rows *positions k"],
    mask: Bool[Tensor, "rows tokens"] | None,
) -> Float[Tensor, "3 experts"]:
    """What a load-balancing loss is made of, as sums over real tokens, so that layers can be pooled or averaged.

    Returns:
        Per expert: how many choices fell on it (no gradient), the sum of its probabilities, the number of tokens.
    """
    experts = probabilities.shape[-1]
    probabilities = probabilities.flatten(0, -2)
    chosen = F.one_hot(choices.flatten(0, -2), experts).sum(dim=-2).to(probabilities.dtype)
    weight = torch.ones_like(probabilities[:, :1]) if mask is None else mask.to(probabilities.dtype).reshape(-1, 1)
    tokens = weight.sum().expand(experts)
    return torch.stack(((chosen * weight).sum(0).detach(), (probabilities * weight).sum(0), tokens))


def has_processes() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized()


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, through which gradients flow; `value` itself where there is only one.

    Every process must call it the same number of times in the same order.
    """
    if not has_processes():
        return value
    total: Tensor = _Sum.apply(value)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    """Every process's loss depends on every process's value: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_processes(gradient)


def balance_loss(counts: Float[Tensor, "3 experts"]) -> Float[Tensor, ""]:
    """Load-balancing loss E * sum_e f_e p_e with f_e the fraction of choices, p_e the mean probability.

    All k choices of a token count, so that perfect balance gives k.
    """
    chosen, probability, tokens = counts
    tokens = tokens.clamp(min=1)
    return torch.dot(chosen / tokens, probability / tokens) * counts.shape[1]
