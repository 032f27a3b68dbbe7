"""DCFT: the update is a deconvolution of a product of two vectors, or of a low-rank product.

Paper: Zhang et al., Parameter-Efficient Fine-Tuning of Large Language Models via Deconvolution in Subspace,
arXiv 2503.01419 (COLING 2025).
Release: Godz-z/DCFT, commit 96bbb1ae (MIT).

    Z = B A                                A (r, in // s), B (out // s, r); r = 1 in the paper
    W = conv_transpose2d(Z, C, stride s)   C (s, s): entry (a s + p, b s + q) of W is Z[a, b] C[p, q]
    y = W0 x + alpha W x
    orthogonality = mean over the sites' factors of ||A A^T - I|| and ||B^T B - I||, Frobenius norms

W is the Kronecker product of Z and C: of rank r s where a LoRA of as many parameters has rank r / s. Where s does not
divide a side, the last rows or columns of W are zero. EPT with one kernel size and one expert computes the same W.

Differences between paper and release (preset `released` reproduces those that change numbers):
* the release draws all three factors from N(0, 0.02^2), so that a fresh adapter changes the model a little:
  ``start="normal"``; here C starts at zero, as EPT's kernels do;
* the release fixes s = 2 and r = 1, divides alpha by a rank that it does not use plus 1e-5, and keeps C transposed:
  alpha stands for the quotient here;
* the constraint's coefficient 0.1 is the default of its function; the training script that sets it is not released.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moepeft.config import MethodConfig
from moepeft.context import SiteContext
from moepeft.errors import Unsupported
from moepeft.fast import has_fast_path
from moepeft.methods._fast import dcft as _fast
from moepeft.methods._validation import check_choices, check_count, check_dropout, check_positive
from moepeft.ops.draws import normal
from moepeft.ops.linear import dropout_of
from moepeft.protocols import Base, Capabilities, LinearSite


@dataclass(frozen=True, kw_only=True)
class DCFT(MethodConfig):
    """Configuration of DCFT.

    Attributes:
        rank: rank r of the product that is expanded.
        kernel: side s of the kernel, which is the stride as well.
        alpha: factor of the update.
        start: the kernel starts at zero, or at normal draws.
        orthogonality: coefficient of the constraint on the factors.
        dropout: probability of dropping an input feature of the adapter while training.
    """

    name: ClassVar[str] = "dcft"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {}, "released": {"start": "normal"}}
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {"unconstrained": {"orthogonality": 0.0}}
    sizes: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int = 1
    kernel: int = 2
    alpha: float = 16.0
    start: Literal["zero", "normal"] = "zero"
    orthogonality: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("DCFT", "rank", self.rank)
        check_count("DCFT", "kernel", self.kernel)
        check_positive("DCFT", "alpha", self.alpha)
        check_positive("DCFT", "orthogonality", self.orthogonality, zero=True)
        check_choices("DCFT", self)
        check_dropout("DCFT", self.dropout)

    @property
    def capabilities(self) -> Capabilities:
        """Mergeable, the same for all rows; the constraint is its auxiliary loss."""
        return Capabilities(
            identity_at_init=self.start == "zero", aux_losses=("orthogonality",) if self.orthogonality else ()
        )

    def select(self, sites: Sequence[LinearSite]) -> Sequence[LinearSite]:
        """Sites whose sides are no smaller than the kernel.

        Raises:
            Unsupported: a site is smaller, so that nothing of it could be adapted.
        """
        for site in sites:
            if min(site.in_features, site.out_features) < self.kernel:
                raise Unsupported(
                    f"DCFT: kernel={self.kernel} is larger than a side of {site.name!r} ({site.out_features} x "
                    f"{site.in_features}): choose a smaller kernel, or leave the layer out of `sites`"
                )
        return sites

    def build(self, site: LinearSite, shared: nn.Module | None) -> nn.Module:
        """Two factors and the kernel."""
        return DCFTAdapter(site, self)

    def count(self, sites: Sequence[LinearSite]) -> int:
        """r (in // s + out // s) + s^2 per site."""
        s = self.kernel
        return sum(self.rank * (site.in_features // s + site.out_features // s) + s * s for site in sites)

    def aux_loss(self, name: str, terms: Sequence[Tensor]) -> Tensor:
        """Coefficient times the mean over sites."""
        return self.orthogonality * torch.stack(list(terms)).mean()


def deconvolution(
    A: Float[Tensor, "r a"], B: Float[Tensor, "b r"], C: Float[Tensor, "s s"], shape: tuple[int, int]
) -> Float[Tensor, "o i"]:
    """W = Z (x) C with Z = B A, zero beyond what the kernel's stride reaches; of the shape (out, in)."""
    W = torch.kron(B @ A, C)
    return nn.functional.pad(W, (0, shape[1] - W.shape[1], 0, shape[0] - W.shape[0]))


@has_fast_path(_fast.update)
def update(
    x: Float[Tensor, "*n i"], A: Float[Tensor, "r a"], B: Float[Tensor, "b r"], C: Float[Tensor, "s s"], out: int
) -> Float[Tensor, "*n o"]:
    """W x."""
    return nn.functional.linear(x, deconvolution(A, B, C, (out, x.shape[-1])))


def distance_from_orthonormal(factor: Float[Tensor, "r n"]) -> Float[Tensor, ""]:
    """||F F^T - I||, which is zero where the rows of F are orthonormal."""
    gram = factor @ factor.T
    distance: Tensor = torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return distance


class DCFTAdapter(nn.Module):
    """The factors A (r, in // s) and B (out // s, r) of one site, and its kernel C (s, s)."""

    def __init__(self, site: LinearSite, config: DCFT) -> None:
        super().__init__()
        self.config = config
        self.shape = site.out_features, site.in_features
        self.scale = config.alpha
        s = config.kernel
        self.A = nn.Parameter(normal((config.rank, site.in_features // s), 0.02))
        self.B = nn.Parameter(normal((site.out_features // s, config.rank), 0.02))
        self.C = nn.Parameter(normal((s, s), 0.02 if config.start == "normal" else 0.0))
        self.dropout = dropout_of(config.dropout)

    def forward(self, x: Float[Tensor, "rows *n i"], base: Base, ctx: SiteContext) -> Float[Tensor, "rows *n o"]:
        """The frozen layer's output plus the expanded update."""
        y = base(x)
        if self.training and self.config.orthogonality:
            ctx.loss("orthogonality", (distance_from_orthonormal(self.A) + distance_from_orthonormal(self.B.T)) / 2)
        A, B, C = (factor.to(x.dtype) for factor in (self.A, self.B, self.C))
        return y + self.scale * update(self.dropout(x), A, B, C, self.shape[0]).to(y.dtype)

    def delta_weight(self, task: int | None) -> Float[Tensor, "o i"]:
        """alpha (B A) (x) C, zero where s does not divide a side."""
        return self.scale * deconvolution(self.A, self.B, self.C, self.shape)

    def lora_factors(self, task: int | None) -> tuple[Float[Tensor, "rs i"], Float[Tensor, "o rs"]]:
        """A (x) C and B (x) I: a LoRA of rank r s."""
        s = self.config.kernel
        down, up = torch.kron(self.A, self.C), torch.kron(self.B, torch.eye(s).to(self.B))
        out, into = self.shape
        pad = nn.functional.pad
        return pad(down, (0, into - down.shape[1])), pad(up, (0, 0, 0, out - up.shape[0]))
