"""What an expert is in EPT's release, which convolves activations where the equations convolve the seed's matrix.

A seed maps the first in // s features to out // s channels. A transposed convolution with one group per channel and
stride s then repeats every channel s times, each copy with a factor of its own. So a kernel holds out // s rows of s
factors, and an expert never reads the features after the first in // s.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def kernel_shape(s: int, out_features: int) -> tuple[int, int]:
    """One row of s factors per channel."""
    return out_features // s, s


def expert_update(
    x: Float[Tensor, "rows *n i"],
    A: Float[Tensor, "r i_s"],
    B: Float[Tensor, "o_s r"],
    K: Float[Tensor, "rows *m h s"],
    out_features: int,
) -> Float[Tensor, "rows *n o"]:
    """W_e x for the release's W_e, whose row c s + j is K[c, j] times row c of B[:out // s] A[:, :in // s]."""
    h, s = K.shape[-2:]
    w = x.shape[-1] // s
    channels = F.linear(F.linear(x[..., :w], A[:, :w]), B[:h])
    stretched = channels.unsqueeze(-1) * K
    return F.pad(stretched.flatten(-2), (0, out_features - h * s))
