"""Losses that balance the load of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moepeft.ops.precision import without_autocast


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
    weight = torch.ones_like(probabilities[:, 0]) if mask is None else mask.to(probabilities.dtype).flatten()
    with without_autocast(weight):  # a sum over tokens is kept in the type of what is summed
        return torch.stack((weight @ chosen, weight @ probabilities, weight.sum().expand(experts)))


def balance_loss(counts: Float[Tensor, "*layers 3 experts"]) -> Float[Tensor, "*layers"]:
    """Load-balancing loss E * sum_e f_e p_e with f_e the fraction of choices, p_e the mean probability.

    All k choices of a token count, so that perfect balance gives k.
    """
    chosen, probability, tokens = counts.unbind(-2)
    return (chosen * probability / tokens.clamp(min=1).square()).sum(dim=-1) * counts.shape[-1]
