"""Regions of a few rows on a GPU, as decoding has them: bound by reading the weights, each of which is read once.

Projections that read the same rows share a launch. An activation or a gate is part of the launch before it, a root mean
square norm of the one behind it where there is a kernel for that, and a residual of the last. Each launch reads its
weights while the one before it ends: an operator has at most four of them, and writes no weight.
"""

from torch import Tensor

from ..kernels import gemv
from ..kernels.operands import Product, RmsNorm
from ..kernels.tiles import empty_with_aligned_rows
from . import norm
from . import projection as proj
from .mlp_region import Mlp
from .norm import Norm
from .projection import Projection


def supported(x: Tensor, *projections: Projection[Tensor] | None) -> bool:
    """Whether the kernel takes these projections of ``x[rows, in_features]``."""
    weights = [w for p in projections if p is not None for w in (p.down, p.up) if w is not None]
    return gemv.supported(x, weights)


def project(
    x: Tensor,
    projections: list[Projection[Tensor]],
    outs: list[Tensor],
    x_norm: Norm | None = None,
    residual: Tensor | None = None,
    follows: bool = False,
) -> None:
    """Fill each of ``outs`` with its projection of ``x[rows, in_features]``: two launches at most, and a norm's own.

    Args:
        projections: up to three.
        outs: ``[rows, out_features]`` each, with contiguous rows.
        x_norm: taken of ``x`` first.
        residual: ``[rows, out_features]``, added to the result of a single projection.
        follows: see :func:`~..kernels.gemv.multiply`.
    """
    latents, follows = _into_rank_space(x, projections, x_norm, follows)
    lifted = zip(latents, projections, outs, strict=True)
    products = [Product(latent, p.up, p.up_bias, out) for latent, p, out in lifted]
    gemv.multiply(*products, residual=residual, follows=follows)


def mlp(x: Tensor, region: Mlp, residual: Tensor | None) -> Tensor:
    """The MLP of ``x[rows, in_features]``: ``[rows, out_features]``, in four launches; see :func:`project`."""
    rows = x.shape[0]
    hidden, out = x.new_empty(rows, region.width), x.new_empty(rows, proj.out_features(region.out))
    # A gate comes first: it is what the activation is applied to.
    into = region.into_hidden[::-1]
    latents, follows = _into_rank_space(x, into, region.x_norm, follows=False)
    lifted = [Product(latent, p.up, p.up_bias, hidden) for latent, p in zip(latents, into, strict=True)]
    gemv.multiply(*lifted, activation=region.activation, gated=region.gate is not None, follows=follows)
    project(hidden, [region.out], [out], residual=residual, follows=True)
    return out


def _into_rank_space(
    x: Tensor, projections: list[Projection[Tensor]], x_norm: Norm | None, follows: bool
) -> tuple[list[Tensor], bool]:
    """``[rows, rank]`` of each projection, a dense one's being ``x``; and whether the next launch follows another."""
    fused = None
    if x_norm is not None:
        fused = _as_part_of_products(x, projections, x_norm)
        if fused is None:
            x, follows = norm.of_rows(x, x_norm), False
    several, odd = len(x) > 1, gemv.has_odd_rows([p.up for p in projections])
    take = gemv.shifted_rows if several and odd else empty_with_aligned_rows
    latents = [x if p.down is None else take(x.shape[0], proj.rank(p), x) for p in projections]
    narrow = [
        Product(x, p.down, p.down_bias, latent)
        for p, latent in zip(projections, latents, strict=True)
        if p.down is not None
    ]
    if narrow:
        gemv.multiply(*narrow, norm=fused, follows=follows)
    return latents, follows or bool(narrow)


def _as_part_of_products(x: Tensor, projections: list[Projection[Tensor]], x_norm: Norm) -> RmsNorm | None:
    """A norm as the kernel takes it: a root mean square of rows that nothing but products of it read."""
    weights = [p.down for p in projections if p.down is not None]
    if x_norm.centred or x_norm.bias is not None or len(weights) < len(projections):
        return None
    taken = RmsNorm(None if x_norm.weight is None else x_norm.weight.reshape(-1), x_norm.eps)
    return taken if gemv.normalises(x, weights, taken) else None
