"""Losses that balance the load of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


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


def balance_loss(counts: Float[Tensor, "3 experts"]) -> Float[Tensor, ""]:
    """Load-balancing loss E * sum_e f_e p_e with f_e the fraction of choices, p_e the mean probability.

    All k choices of a token count, so that perfect balance gives k.
    """
    chosen, probability, tokens = counts
    tokens = tokens.clamp(min=1)
    return torch.dot(chosen / tokens, probability / tokens) * counts.shape[1]
