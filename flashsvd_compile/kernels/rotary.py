"""Rotary position embedding in place (Su et al. 2021, arXiv:2104.09864, eq. 34), one pass over the heads."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import SECOND_AXIS, launch

BLOCK_ELEMENTS = 2048


@triton.jit
def rotary_kernel(
    x, cos, sin, stride_xb, stride_xl, stride_xh, stride_cb, stride_cl, stride_sb, stride_sl, length, heads,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_L: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Positions ``BLOCK_L * program_id(0) ..`` of one head of one batch item."""
    item = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    position = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    pair = tl.arange(0, BLOCK_HALF)
    if INTERLEAVED:
        first = pair * 2
        second = pair * 2 + 1
    else:
        first = pair
        second = pair + HALF
    mask = (position[:, None] < length) & (pair[None, :] < HALF)
    x += item.to(tl.int64) * stride_xb + head * stride_xh + position[:, None].to(tl.int64) * stride_xl
    cos += item * stride_cb + position[:, None] * stride_cl
    sin += item * stride_sb + position[:, None] * stride_sl
    x1 = tl.load(x + first[None, :], mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + second[None, :], mask=mask, other=0.0).to(tl.float32)
    cos1 = tl.load(cos + first[None, :], mask=mask, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + second[None, :], mask=mask, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + first[None, :], mask=mask, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + second[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(x + first[None, :], (x1 * cos1 - x2 * sin1).to(x.dtype.element_ty), mask=mask)
    tl.store(x + second[None, :], (x2 * cos2 + x1 * sin2).to(x.dtype.element_ty), mask=mask)


def with_adjacent_features(table: Tensor) -> Tensor:
    """A table ``[items, len, rotary_dim]`` itself, or a copy as the kernel reads it."""
    return table if table.stride(2) == 1 else table.contiguous()


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first ``rotary_dim`` features of each head, in place.

    Args:
        heads: ``[items, len, heads, dim]``, features adjacent, any strides before.
        cos, sin: ``[items or 1, len, rotary_dim]``, any strides; tables whose features are not adjacent are copied.
        interleaved: rotate neighbours (2i, 2i + 1) instead of halves (i, i + rotary_dim / 2).
    """
    items, length, count, _ = heads.shape
    half = cos.shape[-1] // 2
    block_half = triton.next_power_of_2(half)
    block_l = max(1, BLOCK_ELEMENTS // block_half)
    cos, sin = with_adjacent_features(cos), with_adjacent_features(sin)
    together = max(1, SECOND_AXIS // count)
    if items > together:
        for some in (slice(first, first + together) for first in range(0, items, together)):
            of_these = (table if table.shape[0] == 1 else table[some] for table in (cos, sin))
            rotate_(heads[some], *of_these, interleaved)
        return heads
    cos_item, sin_item = (0 if table.shape[0] == 1 else table.stride(0) for table in (cos, sin))
    launch(
        rotary_kernel,
        (triton.cdiv(length, block_l), items * count),
        heads,
        cos,
        sin,
        *heads.stride()[:3],
        cos_item,
        cos.stride(1),
        sin_item,
        sin.stride(1),
        length,
        count,
        HALF=half,
        BLOCK_HALF=block_half,
        BLOCK_L=block_l,
        INTERLEAVED=interleaved,
        num_warps=4,
    )
    return heads
