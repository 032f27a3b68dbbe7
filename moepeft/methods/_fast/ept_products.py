"""The products and the sorting of the sorted form, on tensors whose features are sorted by residue, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# A product per group needs no sorting of its result. Groups with fewer tokens are faster multiplied together.
FEW_TOKENS = 16


def mix(kernel: Float[Tensor, "groups S S"], low: Float[Tensor, "groups g k tokens"]) -> Tensor:
    """K (x) I_r of every group, applied to the group's tokens in the rank space."""
    return torch.bmm(kernel, by_side(low, kernel.shape[1])).view(low.shape)


def by_side(low: Float[Tensor, "groups g k tokens"], S: int) -> Float[Tensor, "groups S r_tokens"]:
    """The rank space as kernels of side S see it."""
    return low.view(len(low), S, low.shape[1:].numel() // S)


def into_rank_space(
    features: Float[Tensor, "groups g tokens d_g"], factor: Float[Tensor, "k d_g"]
) -> Float[Tensor, "groups g k tokens"]:
    """`factor` applied to the sorted features of every token."""
    groups, g, tokens, width = features.shape
    if multiplies_together(features, tokens):
        return transpose(F.linear(features, factor))
    stack = features.view(groups * g, tokens, width)
    return torch.bmm(factor.expand(groups * g, -1, -1), stack.mT).view(groups, g, len(factor), tokens)


def out_of_rank_space(
    low: Float[Tensor, "groups g k tokens"], factor: Float[Tensor, "k d_g"], room: Tensor | None, rows: slice
) -> Float[Tensor, "all_groups g tokens d_g"]:
    """The transposed `factor` applied to every token, on its own or in these rows of `room`."""
    groups, g, k, tokens = low.shape
    if multiplies_together(low, tokens):
        made = F.linear(transpose(low), factor.T)
        if room is None:
            return made
        room[rows] = made
        return room
    stack, factors = low.view(groups * g, k, tokens).mT, factor.expand(groups * g, -1, -1)
    if room is None:
        return torch.bmm(stack, factors).view(groups, g, tokens, factor.shape[1])
    torch.bmm(stack, factors, out=room[rows].flatten(0, 1))
    return room


def multiplies_together(x: Tensor, tokens: int) -> bool:
    """Whether all groups are one matrix: groups are small, or the product by groups would copy the factor."""
    return tokens < FEW_TOKENS or x.dtype in (torch.bfloat16, torch.float16)


def of_factor(
    low: Float[Tensor, "groups g k tokens"], features: Float[Tensor, "groups g tokens d_g"]
) -> Float[Tensor, "d_g k"]:
    """Gradient of a transposed factor: the sum over tokens of outer products."""
    return torch.mm(features.flatten(0, 2).T, transpose(low).flatten(0, 2))


def sort_by_residue(x: Float[Tensor, "groups tokens d"], g: int) -> Float[Tensor, "groups g tokens d_g"]:
    """The features of each residue mod `g` beside each other; features after the last multiple of `g` are dropped."""
    groups, tokens, width = x.shape[0], x.shape[1], x.shape[2] // g
    return transpose(x[..., : width * g].reshape(groups, tokens * width, g)).view(groups, g, tokens, width)


def unsort(features: Float[Tensor, "groups g tokens d_g"], shape: Sequence[int]) -> Tensor:
    """A new tensor of `shape` with every feature at its place, and zeros where there is none."""
    whole = features.shape[1] * features.shape[3]
    placed = transpose(features.flatten(2)).view(*shape[:-1], whole)
    return F.pad(placed, (0, shape[-1] - whole)) if whole < shape[-1] else placed  # an empty pad would copy


def transpose(x: Float[Tensor, "*n a b"]) -> Float[Tensor, "*n b a"]:
    """A transposed copy.

    Torch copies faster with its shuffle of channels, but not in 16 bits.
    """
    if x.element_size() < 4 or x.numel() == 0:
        return x.mT.clone(memory_format=torch.contiguous_format)
    # The matrices are taken as the positions of an image, and their numbers as its channels.
    *n, a, b = x.shape
    image = x.contiguous().view(1, -1, 1, a * b).permute(0, 3, 1, 2)
    return torch.channel_shuffle(image, a).permute(0, 2, 3, 1).reshape(*n, b, a)
