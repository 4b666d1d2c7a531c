"""Keys and values out of rank space on a GPU, a group of heads of some batch items at a time.

Straight from the input by one kernel that keeps their rank space on chip; or by products of their rank space, which
was computed before; or, where their weights lie side by side, both by one product.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import projection as projection_kernel
from ..kernels import rotary as rotary_kernel
from ..kernels.operands import Product, Rotation, begin_alike
from ..kernels.product import multiply, rotates
from . import projection as proj
from .attention_region import Attention
from .projection import Projection
from .workspace import Workspace, affine_into, affines_into, rows_of

MAX_PROJECTED_RANK = 256
"""Above it the library's two products are faster: 102 us against 174 at rank 304, 16384 rows of 768 (H100)."""

Lift = Callable[[int, int], tuple[Tensor, Tensor]]
"""``lift(first, count)``: keys, rotated, and values of a group of heads, ``[items, kv_len, count, dim]`` each."""


def is_fused(x: Tensor, *projections: Projection[Tensor]) -> bool:
    """Whether the projection kernel takes these projections of ``x``."""
    ranks = [proj.rank(projection) for projection in projections]
    high = max(ranks) > MAX_PROJECTED_RANK
    return x.dtype != torch.float32 and not high and projection_kernel.supported(ranks, x.dtype, x.device)


def lifter(context: Tensor, attn: Attention, workspace: Workspace, queries: Tensor | None, follows: bool) -> Lift:
    """How keys and values of these items come out of rank space.

    Args:
        context: ``[items, kv_len, in_features]``.
        queries: filled, too, where they come together: ``[items, kv_len, heads, head_dim]``, all heads at once.
        follows: the launch before is this operator's: it projects or rotates queries, or attends to other keys.
    """
    items, rows = context.shape[0], rows_of(context)
    if not is_fused(context, attn.k, attn.v):
        return lifter_of(_latents(rows, attn, workspace), items, attn, workspace)

    def lift(first: int, count: int) -> tuple[Tensor, Tensor]:
        k, v = _take(items, len(rows) // items, count, attn, workspace)
        maps = [
            map_of(attn.k, _features(first, count, attn.head_dim), k.view(len(rows), -1)),
            map_of(attn.v, _features(first, count, attn.value_dim), v.view(len(rows), -1)),
        ]
        if queries is not None:
            maps.append(map_of(attn.q, slice(None), queries.view(len(rows), -1)))
        projection_kernel.project(rows, *maps, ahead=follows and begin_alike(rows, context))
        rotate_(k, attn)
        if queries is not None:
            rotate_(queries, attn)
        return k, v

    return lift


def lifter_of(latents: list[Tensor], items: int, attn: Attention, workspace: Workspace) -> Lift:
    """How keys and values come out of their ``[items * kv_len, rank]``, by products of all rows."""
    rows = len(latents[0])

    def lift(first: int, count: int) -> tuple[Tensor, Tensor]:
        lifted = _take(items, rows // items, count, attn, workspace)

        def product(out: Tensor, latent: Tensor, projection: Projection[Tensor]) -> Product:
            some = _features(first, count, out.shape[-1])
            bias = None if projection.up_bias is None else projection.up_bias[some]
            return Product(latent, projection.up[some], bias, out.view(rows, -1))

        keys, values = map(product, lifted, latents, (attn.k, attn.v))
        rotation = rotation_of(keys, rows, attn)
        if rotation is not None:
            multiply(keys, rotation=rotation)
            affines_into(values)
        else:
            affines_into(keys, values)
            rotate_(lifted[0], attn)
        return lifted

    return lift


def lifter_of_both(context: Tensor, both: Projection[Tensor], attn: Attention, workspace: Workspace) -> Lift:
    """How keys and values of all heads come side by side out of ``context[items, kv_len, in_features]``."""
    widths = attn.num_kv_heads * attn.head_dim, attn.num_kv_heads * attn.value_dim

    def lift(first: int, count: int) -> tuple[Tensor, Tensor]:
        lifted = workspace.aligned().take(*context.shape[:2], sum(widths))
        affine_into(rows_of(lifted), rows_of(context), both.up, both.up_bias)
        keys, values = lifted.split(widths, dim=-1)
        return keys.unflatten(-1, (count, -1)), values.unflatten(-1, (count, -1))

    return lift


def map_of(projection: Projection[Tensor], features: slice, out: Tensor) -> projection_kernel.Map:
    """Some features of a low-rank projection, as the kernel takes it."""
    assert projection.down is not None
    bias = None if projection.up_bias is None else projection.up_bias[features]
    return projection_kernel.Map(projection.down, projection.down_bias, projection.up[features], bias, out)


def into_rank_space(rows: Tensor, projection: Projection[Tensor], latent: Tensor) -> Product:
    """The product that fills ``latent[rows, rank]``."""
    assert projection.down is not None
    return Product(rows, projection.down, projection.down_bias, latent)


def rotation_of(product: Product, rows: int, attn: Attention) -> Rotation | None:
    """The region's rotation of the first row on, if a kernel applies it to products like this one.

    Args:
        product: of all rows, or of the first chunk of them.
        rows: of all chunks.
    """
    cos, sin = attn.cos, attn.sin
    if cos is None or sin is None or attn.interleaved or cos.shape[-1] != attn.head_dim:
        return None
    if len(cos) > 1 and not (cos.is_contiguous() and sin.is_contiguous()):
        return None
    rotation, chunk = Rotation(cos.flatten(0, 1), sin.flatten(0, 1)), len(product.out)
    # All chunks begin at multiples of the second one's first row.
    of_second = rotation._replace(first=chunk if chunk < rows else 0)
    return rotation if rotates(product, of_second, wraps=rows > len(rotation.cos)) else None


def rotate_(heads: Tensor, attn: Attention) -> Tensor:
    """Rotary position embedding of ``[items, len, heads, dim]``, in place; nothing without ``cos`` and ``sin``."""
    if attn.cos is None or attn.sin is None:
        return heads
    return rotary_kernel.rotate_(heads, attn.cos, attn.sin, attn.interleaved)


def _latents(rows: Tensor, attn: Attention, workspace: Workspace) -> list[Tensor]:
    """``[rows, rank]`` of keys and of values; the rows themselves for a dense projection."""
    latents, products = [], []
    for projection in (attn.k, attn.v):
        latent = rows
        if projection.down is not None:
            latent = workspace.take(len(rows), proj.rank(projection))
            products.append(into_rank_space(rows, projection, latent))
        latents.append(latent)
    affines_into(*products)
    return latents


def _take(items: int, kv_len: int, count: int, attn: Attention, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Room for keys and for values of ``count`` heads, ``[items, kv_len, count, dim]`` each."""
    return (
        workspace.aligned().take(items, kv_len, count, attn.head_dim),
        workspace.aligned().take(items, kv_len, count, attn.value_dim),
    )


def _features(first: int, count: int, dim: int) -> slice:
    return slice(first * dim, (first + count) * dim)
