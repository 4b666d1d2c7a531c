"""Attention of short sequences with keys and values straight out of rank space.

    out = softmax(scale * q @ (latent_k @ up_k.T + bias_k).T + mask) @ (latent_v @ up_v.T + bias_v)

One program takes a block of queries of one head of one item and lifts all of that head's keys and values where it uses
them. A sequence of up to :data:`MAX_KEYS` keys is one block, so that nothing is lifted twice but for further blocks of
queries, and neither keys nor values pass through memory.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import LOG2_E
from .autotune import about, tuned
from .launch import launch
from .target import Target, describable, precision_of, target_of
from .tiles import MAX_RANK, head_columns, load_tile, pieces, tile_views, with_aligned_rows

MAX_KEYS = 128
MAX_QUERIES = 2 * MAX_KEYS
"""More blocks of queries would lift the same keys again and again."""
BLOCK_Q = 128
_RESERVE = 4096  # barriers and what softmax exchanges between warps


class Tile(NamedTuple):
    """Launch configuration: queries per block, warps."""

    block_q: int
    num_warps: int


class Factors(NamedTuple):
    """Keys or values in rank space.

    Attributes:
        latent: ``[items * kv_len, rank]``, contiguous rows.
        up: ``[kv_heads * dim, rank]``.
        bias: ``[kv_heads * dim]`` or ``None``.
    """

    latent: Tensor
    up: Tensor
    bias: Tensor | None


@triton.jit
def _lifted(
    latent_0, latent_1, latent_2, up_0, up_1, up_2, bias, row, feature, rows, features, rank, stride_latent,
    stride_up_f, stride_up_r, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BLOCK_K: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_K, BLOCK_D]`` in float32: rows ``row ..`` of one head, whose features start at ``feature``."""
    x0 = load_tile(latent_0, row, 0, rows, rank, stride_latent, 1, BLOCK_K, R0, DESCRIPTOR)
    u0 = load_tile(up_0, feature, 0, features, rank, stride_up_f, stride_up_r, BLOCK_D, R0, DESCRIPTOR)
    lifted = tl.dot(x0, u0.T, input_precision=PRECISION)
    if R1 > 0:
        x1 = load_tile(latent_1, row, R0, rows, rank, stride_latent, 1, BLOCK_K, R1, DESCRIPTOR)
        u1 = load_tile(up_1, feature, R0, features, rank, stride_up_f, stride_up_r, BLOCK_D, R1, DESCRIPTOR)
        lifted = tl.dot(x1, u1.T, lifted, input_precision=PRECISION)
    if R2 > 0:
        x2 = load_tile(latent_2, row, R0 + R1, rows, rank, stride_latent, 1, BLOCK_K, R2, DESCRIPTOR)
        u2 = load_tile(up_2, feature, R0 + R1, features, rank, stride_up_f, stride_up_r, BLOCK_D, R2, DESCRIPTOR)
        lifted = tl.dot(x2, u2.T, lifted, input_precision=PRECISION)
    if HAS_BIAS:
        d = tl.arange(0, BLOCK_D)
        lifted += tl.load(bias + feature + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
    return lifted


@triton.jit
def short_attention_kernel(
    q, latent_k0, latent_k1, latent_k2, up_k0, up_k1, up_k2, bias_k,
    latent_v0, latent_v1, latent_v2, up_v0, up_v1, up_v2, bias_v, out, key_padding,
    stride_qm, stride_latent_k, stride_up_kf, stride_up_kr, stride_latent_v, stride_up_vf, stride_up_vr,
    stride_ob, stride_om, stride_pb, stride_p, items, q_len, kv_len, num_heads, kv_heads, rank_k, rank_v, scale,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    GROUP: tl.constexpr, PADDED: tl.constexpr, WINDOW_LEFT: tl.constexpr, WINDOW_RIGHT: tl.constexpr,
    HAS_BIAS_K: tl.constexpr, HAS_BIAS_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries ``BLOCK_Q * program_id(0) ..`` of head ``program_id(1) % num_heads`` of one item.

    q is ``[items * q_len, num_heads * DIM]``; the latents and ``up`` arrive once per piece of their rank. The softmax
    is taken in base 2: ``scale`` includes log2(e).
    """
    item = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    queries = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_K)
    feature = (head // GROUP) * DIM
    row, rows, features = item * kv_len, items * kv_len, kv_heads * DIM
    dtype: tl.constexpr = out.dtype.element_ty

    visible = (keys < kv_len)[None, :]
    if PADDED:
        padding = tl.load(key_padding + item * stride_pb + keys * stride_p, mask=keys < kv_len, other=0)
        visible &= padding.to(tl.int1)[None, :]
    if WINDOW_RIGHT >= 0:
        visible &= keys[None, :] <= queries[:, None] + WINDOW_RIGHT
    if WINDOW_LEFT >= 0:
        visible &= keys[None, :] >= queries[:, None] - WINDOW_LEFT

    k = _lifted(
        latent_k0, latent_k1, latent_k2, up_k0, up_k1, up_k2, bias_k, row, feature, rows, features, rank_k,
        stride_latent_k, stride_up_kf, stride_up_kr, K0, K1, K2, BLOCK_K, DIM, BLOCK_D, HAS_BIAS_K, DESCRIPTOR,
        PRECISION,
    ).to(dtype)  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    of_query = (item * q_len + queries)[:, None].to(tl.int64) * stride_qm + head * DIM + d[None, :]
    inside = (queries[:, None] < q_len) & (d[None, :] < DIM)
    query = tl.load(q + of_query, mask=inside, other=0.0)
    # Features from DIM on are another head's among the keys and 0 among the queries.
    scores = tl.where(visible, tl.dot(query, k.T, input_precision=PRECISION) * scale, float("-inf"))
    row_max = tl.max(scores, 1)
    # A query that sees no key keeps the maximum -inf; shift by 0 there to avoid inf - inf.
    p = tl.exp2(scores - tl.where(row_max == float("-inf"), 0.0, row_max)[:, None])
    row_sum = tl.sum(p, 1)

    v = _lifted(
        latent_v0, latent_v1, latent_v2, up_v0, up_v1, up_v2, bias_v, row, feature, rows, features, rank_v,
        stride_latent_v, stride_up_vf, stride_up_vr, V0, V1, V2, BLOCK_K, DIM, BLOCK_D, HAS_BIAS_V, DESCRIPTOR,
        PRECISION,
    )  # fmt: skip
    v = tl.where((keys < kv_len)[:, None], v, 0.0).to(dtype)  # rows beyond are the next item's
    result = tl.dot(p.to(dtype), v, input_precision=PRECISION)
    result = result / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    pointers = out + item.to(tl.int64) * stride_ob + queries[:, None].to(tl.int64) * stride_om + head * DIM + d[None, :]
    tl.store(pointers, result.to(dtype), mask=inside)


def supported(
    q_len: int, kv_len: int, dim: int, ranks: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the kernel is meant for these sizes and has registers and shared memory for them.

    Without tensor descriptors addresses take the registers that it needs; such chips lift keys and values beforehand.
    """
    target = target_of(device)
    short = kv_len <= MAX_KEYS and q_len <= MAX_QUERIES and dim <= MAX_KEYS
    if not short or not target.descriptors or dtype.itemsize != 2 or min(ranks) < 1 or max(ranks) > MAX_RANK:
        return False
    block_d = head_columns(dim)
    tiles = (MAX_KEYS + block_d) * max(pieces(max(ranks)))  # of a factor and a latent, a piece after the other
    return tiles * dtype.itemsize + _RESERVE <= target.shared_memory


def short_attention(
    q: Tensor,
    k: Factors,
    v: Factors,
    out: Tensor,
    *,
    key_padding: Tensor | None,
    kv_heads: int,
    scale: float,
    window_left: int,
    window_right: int,
    tile: Tile | None = None,
) -> None:
    """Fill ``out``; a query that sees no key gives zeros.

    Args:
        q: ``[items, q_len, heads, dim]``, items of one size apart, heads adjacent; may be the memory of ``out``.
        k, v: of ``kv_heads`` heads of size ``dim``, at most :data:`MAX_KEYS` positions an item.
        out: ``[items, q_len, heads, dim]``, laid out as ``q``.
        key_padding: ``[items, kv_len]`` bool, true where visible, or ``None``.
        scale: positive factor on the scores.
        window_left, window_right: key ``j`` is visible to query ``i`` when ``i - left <= j <= i + right``; -1 lifts a
            side.
        tile: overrides the table.
    """
    target, dim = target_of(q.device), q.shape[3]
    k, v = (_readable(factors, target) for factors in (k, v))
    how: dict[str, Any] = {"key_padding": key_padding, "kv_heads": kv_heads, "scale": scale}
    how |= {"window_left": window_left, "window_right": window_right}
    tile = tile or _chosen_tile(q, k, v, out, how)
    _launch(q, k, v, out, descriptor=target.descriptors and dim == head_columns(dim), tile=tile, **how)


def _launch(
    q: Tensor,
    k: Factors,
    v: Factors,
    out: Tensor,
    *,
    key_padding: Tensor | None,
    kv_heads: int,
    scale: float,
    window_left: int,
    window_right: int,
    descriptor: bool,
    tile: Tile,
) -> None:
    """As :func:`short_attention`, factors read by descriptors or without."""
    items, q_len, heads, dim = q.shape
    kv_len = k.latent.shape[0] // max(1, items)
    block_k, block_d = max(16, triton.next_power_of_2(kv_len)), head_columns(dim)
    cut_k, cut_v = pieces(k.up.shape[1]), pieces(v.up.shape[1])

    def tensors(factors: Factors, cut: tuple[int, int, int]) -> list:
        return [
            *tile_views(factors.latent, [(block_k, piece) for piece in cut], descriptor),
            *tile_views(factors.up, [(block_d, piece) for piece in cut], descriptor),
            out if factors.bias is None else factors.bias.contiguous(),
        ]

    launch(
        short_attention_kernel,
        (triton.cdiv(q_len, tile.block_q), items * heads),
        q,
        *tensors(k, cut_k),
        *tensors(v, cut_v),
        out,
        out if key_padding is None else key_padding,
        q.stride(1),
        k.latent.stride(0),
        *k.up.stride(),
        v.latent.stride(0),
        *v.up.stride(),
        out.stride(0),
        out.stride(1),
        *(key_padding.stride() if key_padding is not None else (0, 0)),
        items,
        q_len,
        kv_len,
        heads,
        kv_heads,
        k.up.shape[1],
        v.up.shape[1],
        scale * LOG2_E.value,
        *cut_k,
        *cut_v,
        GROUP=heads // kv_heads,
        PADDED=key_padding is not None,
        WINDOW_LEFT=window_left,
        WINDOW_RIGHT=window_right,
        HAS_BIAS_K=k.bias is not None,
        HAS_BIAS_V=v.bias is not None,
        BLOCK_Q=tile.block_q,
        BLOCK_K=block_k,
        DIM=dim,
        BLOCK_D=block_d,
        DESCRIPTOR=descriptor,
        PRECISION=precision_of(q.dtype),
        num_warps=tile.num_warps,
    )


def tile_of(q_len: int, dim: int) -> Tile:
    """All queries of most sequences at once; of heads of 64 two programs of 4 warps share a processor."""
    return Tile(min(BLOCK_Q, max(16, triton.next_power_of_2(q_len))), 4 if dim <= 64 else 8)


def _chosen_tile(q: Tensor, k: Factors, v: Factors, out: Tensor, how: dict[str, Any]) -> Tile:
    items, q_len, heads, dim = q.shape

    def run(tile: Tile) -> list[Tensor]:
        elsewhere = torch.empty_like(out)  # out may be q
        short_attention(q, k, v, elsewhere, **how, tile=tile)
        return [elsewhere]

    return tuned(
        "short_attention",
        [tile_of(q_len, dim)],
        run,
        q,
        items_and_heads=about(items * heads),
        q_len=about(q_len),
        kv_len=about(k.latent.shape[0] // max(1, items)),
        dim=dim,
        group=heads // how["kv_heads"],
        rank_k=k.up.shape[1],
        rank_v=v.up.shape[1],
        padded=how["key_padding"] is not None,
        window_left=how["window_left"],
        window_right=how["window_right"],
    )


def _readable(factors: Factors, target: Target) -> Factors:
    """Factors whose rows tensor descriptors can address; the latent is made so by the caller."""
    assert factors.latent.stride(1) == 1
    if not target.descriptors:
        return factors
    assert describable(factors.latent)
    return factors._replace(up=with_aligned_rows(factors.up))
