"""Regions of a few rows on a GPU, as decoding has them: bound by reading the weights, each of which is read once.

Projections that read the same rows share a launch, and an activation or a gate is part of the launch before it. Each
launch reads its weights while the one before it ends: an operator has at most four of them, and writes no weight.
"""

from torch import Tensor

from ..kernels import gemv
from ..kernels.operands import Product
from . import projection as proj
from .mlp_region import Mlp
from .projection import Projection


def supported(x: Tensor, *projections: Projection[Tensor] | None) -> bool:
    """Whether the kernel takes these projections of ``x[rows, in_features]``."""
    weights = [w for p in projections if p is not None for w in (p.down, p.up) if w is not None]
    return gemv.supported(x, weights)


def project(x: Tensor, projections: list[Projection[Tensor]], outs: list[Tensor], follows: bool = False) -> None:
    """Fill ``outs[j][rows, out_features]`` with up to three projections of ``x[rows, in_features]``: two launches."""
    latents, follows = _into_rank_space(x, projections, follows)
    lifted = zip(latents, projections, outs, strict=True)
    gemv.multiply(*(Product(latent, p.up, p.up_bias, out) for latent, p, out in lifted), follows=follows)


def mlp(x: Tensor, region: Mlp, activation: str) -> Tensor:
    """The MLP of ``x[rows, in_features]``: ``[rows, out_features]``, in four launches."""
    rows = x.shape[0]
    hidden, out = x.new_empty(rows, region.width), x.new_empty(rows, proj.out_features(region.out))
    # A gate comes first: it is what the activation is applied to.
    into = region.into_hidden[::-1]
    latents, follows = _into_rank_space(x, into, follows=False)
    lifted = [Product(latent, p.up, p.up_bias, hidden) for latent, p in zip(latents, into, strict=True)]
    gemv.multiply(*lifted, activation=activation, gated=region.gate is not None, follows=follows)
    project(hidden, [region.out], [out], follows=True)
    return out


def _into_rank_space(x: Tensor, projections: list[Projection[Tensor]], follows: bool) -> tuple[list[Tensor], bool]:
    """``[rows, rank]`` of each projection, a dense one's being ``x``; and whether the next launch follows another."""
    odd = x.shape[0] > 1 and any(p.up.stride(0) % gemv.PERIOD for p in projections)
    take = gemv.shifted_rows if odd else lambda rows, columns, like: like.new_empty(rows, columns)
    latents = [x if p.down is None else take(x.shape[0], proj.rank(p), x) for p in projections]
    narrow = [
        Product(x, p.down, p.down_bias, latent)
        for p, latent in zip(projections, latents, strict=True)
        if p.down is not None
    ]
    if narrow:
        gemv.multiply(*narrow, follows=follows)
    return latents, follows or bool(narrow)
