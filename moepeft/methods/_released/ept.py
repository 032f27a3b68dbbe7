"""What an expert is in EPT's release, which convolves activations where the equations convolve the seed's matrix.

Differences between paper and release; the preset `released` reproduces them:
* a seed maps the first in // s features to out // s channels. A transposed convolution with one group per channel and
  stride s repeats every channel s times, each copy with a factor of its own. So a kernel is (out // s, s), and an
  expert reads nothing after the first in // s features: ``operator="channel"``;
* seeds are A (r, in // 2), B (out // 2, r) whatever the kernels are: ``seed_width="half"``;
* the top-k probabilities go through a second softmax: ``gates="double_softmax"``; the gate has a bias: ``gate_bias``;
* kernels start at random, not at zero: ``kernel_init="uniform"``. No factor depends on the expert:
  ``dimension_factor="none"``;
* a row's summary is position 0: ``anchor="first"``. The contrastive loss is 0.1 times the mean over the encoder's
  sites: ``contrastive_sites="encoder"``. The decoder's terms are dropped there. The divisor 72 is a literal, the number
  of encoder sites of T5-base. The release's LLaMA has no contrastive loss at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moepeft.config import Recipe
from moepeft.methods._pyramid import Definition, Once, Pyramid, add_experts

PRESET: Mapping[str, Any] = {
    "operator": "channel",
    "seed_width": "half",
    "gates": "double_softmax",
    "gate_bias": True,
    "kernel_init": "uniform",
    "seed_init": "uniform",
    "dimension_factor": "none",
    "contrastive_sites": "encoder",
    "anchor": "first",
    "dropout": 0.1,
}
_SCRIPT = "script/train_ept.sh"
RECIPES: Mapping[str, Recipe] = {
    "glue": Recipe(
        preset="released",
        sites=("q", "k", "v", "o", "wi", "wo"),
        learning_rate=3e-4,
        batch_size=128,
        epochs=10,  # the default: the script's --num_train_epochs 1 does not reach the sampler
        warmup_steps=500,
        weight_decay=0.01,
        max_length=128,
        sources={
            **dict.fromkeys(("rank", "alpha", "kernels", "top_k", "sites", "learning_rate", "batch_size"), _SCRIPT),
            **dict.fromkeys(("warmup_steps", "weight_decay", "max_length"), _SCRIPT),
            **dict.fromkeys(("dropout", "epochs"), "finetune.py"),
        },
    )
}


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


def add_channels(y: Tensor, x: Tensor, gates: Tensor, pyramid: Pyramid, once: Once | None = None) -> Tensor:
    """`add_experts` of the release's experts."""
    return add_experts(expert_update, y, x, gates, pyramid)


DEFINITION = Definition(kernel_shape, add_channels)
