"""Flash attention over lifted heads (Dao et al. 2022, arXiv:2205.14135) with key padding and a window.

The softmax is online; blocks of keys that padding or window hide are skipped, and masks are evaluated only in blocks
they touch.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .activations import LOG2_E
from .autotune import about, tuned
from .launch import launch, take_turn
from .target import TRIPLE, Target, describable, precision_of, speaks_gluon, target_of
from .tiles import by_items, head_columns


class Tile(NamedTuple):
    """Launch configuration: queries and keys per block, warps, pipeline depth."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


MAX_HEAD_DIM = 256


def tile_of(target: Target, dim: int, itemsize: int) -> Tile | None:
    """Configuration for a head size, or ``None``.

    In half precision measured on sm_90; elsewhere one that fits registers and shared memory
    (``tests/kernels/test_cross_compilation.py``).
    """
    if dim > MAX_HEAD_DIM:
        return None
    if itemsize == 4:
        return _triple_tile(dim) if triples(target, dim) else _float32_tile(target, dim)
    if target.shared_memory < _AMPLE:
        return Tile(64, 16, 4, 1) if dim <= 128 else Tile(32, 16, 4, 1)
    if not target.descriptors:
        if dim <= 64:
            return Tile(64, 64, 4, 3)
        return Tile(64, 32, 4, 2) if dim <= 128 else Tile(32, 32, 4, 1)
    if dim <= 64:
        return Tile(64, 64, 4, 2) if target.name == "sm_100" else Tile(64, 128, 4, 2)
    return Tile(64, 64, 4, 3) if dim <= 128 else Tile(64, 32, 4, 2)


_AMPLE = 99 * 1024


def _float32_tile(target: Target, dim: int) -> Tile | None:
    """Without tensor cores a thread holds whole rows of its operands: long rows leave it few scores."""
    if target.shared_memory < _AMPLE:
        return None
    if dim <= 32:
        return Tile(64, 32, 4, 1)
    if not target.descriptors:
        return Tile(32, 32, 8, 1) if dim <= 128 else Tile(32, 16, 8, 1)
    if dim <= 64:
        return Tile(32, 16, 8, 1)
    return Tile(16, 16, 8, 1) if dim <= 128 else None


TRIPLE_DIM = 64
"""Largest head that tensor cores multiply in float32: both parts of a block of queries stay in registers."""
TRIPLE_TILE = Tile(128, 64, 8, 3)
"""The fastest of eight at 512 and 4096 keys (H100, heads of 64): 0.56 of the library's time, 0.7 of its error."""
TRIPLE_TILE_BY_POINTER = Tile(64, 32, 8, 2)
"""The same for heads that descriptors do not read: addresses take registers."""


def triples(target: Target, dim: int) -> bool:
    """Whether float32 is multiplied by tensor cores, in three products of tf32 whether or not one would be allowed."""
    return target.triple_tf32 and target.descriptors and dim <= TRIPLE_DIM


def _triple_tile(dim: int) -> Tile:
    return TRIPLE_TILE if dim == triton.next_power_of_2(dim) else TRIPLE_TILE_BY_POINTER


@triton.jit
def key_bounds_kernel(key_padding, bounds, stride_b, stride_k, kv_len, BLOCK: tl.constexpr):
    """Per batch item: first visible key, one past the last, and how many are visible."""
    item = tl.program_id(0)
    first = kv_len
    last = 0
    count = 0
    for start in range(0, kv_len, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        visible = tl.load(key_padding + item * stride_b + keys * stride_k, mask=keys < kv_len, other=0).to(tl.int32)
        first = tl.minimum(first, tl.min(tl.where(visible > 0, keys, kv_len)))
        last = tl.maximum(last, tl.max(tl.where(visible > 0, keys + 1, 0)))
        count += tl.sum(visible)
    tl.store(bounds + item * 3, first)
    tl.store(bounds + item * 3 + 1, last)
    tl.store(bounds + item * 3 + 2, count)


@triton.jit
def _tile(source, item, row, column, length, stride_b, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
          DIM: tl.constexpr, DESCRIPTOR: tl.constexpr):  # fmt: skip
    """``[ROWS, COLUMNS]`` of an item of ``[items, length, heads * DIM]``.

    Rows behind its last are 0, not the next item's: what hides them multiplies them by 0, which leaves a NaN a NaN. So
    are columns from DIM on, but with descriptors, whose tiles are as wide as a head.
    """
    if DESCRIPTOR:
        return source.load([item, row, column]).reshape(ROWS, COLUMNS)
    else:
        rows = row + tl.arange(0, ROWS)
        columns = tl.arange(0, COLUMNS)
        source += item.to(tl.int64) * stride_b + column
        pointers = source + rows[:, None].to(tl.int64) * stride + columns[None, :]
        return tl.load(pointers, mask=(rows[:, None] < length) & (columns[None, :] < DIM), other=0.0)


@triton.jit
def _attend(
    acc, row_max, row_sum, q, k, v, key_padding, item, start, stop, kv_len, head_k, head_v, queries,
    stride_kb, stride_k, stride_vb, stride_v, stride_p, scale,
    MASKED: tl.constexpr, PADDED: tl.constexpr, WINDOW_LEFT: tl.constexpr, WINDOW_RIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One pass over keys ``start .. stop`` of the online softmax; ``MASKED`` blocks look at padding and window."""
    for n in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        key = _tile(k, item, n, head_k, kv_len, stride_kb, stride_k, BLOCK_K, BLOCK_D, HEAD_DIM, DESCRIPTOR)
        scores = tl.dot(q, key.T, input_precision=PRECISION)
        if MASKED:
            keys = n + tl.arange(0, BLOCK_K)
            visible = (keys < kv_len)[None, :]
            if PADDED:
                visible &= tl.load(key_padding + keys * stride_p, mask=keys < kv_len, other=0).to(tl.int1)[None, :]
            if WINDOW_RIGHT >= 0:
                visible &= keys[None, :] <= queries[:, None] + WINDOW_RIGHT
            if WINDOW_LEFT >= 0:
                visible &= keys[None, :] >= queries[:, None] - WINDOW_LEFT
            scores = tl.where(visible, scores * scale, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            # A row that has seen no visible key keeps the maximum -inf; shift by 0 there to avoid inf - inf.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(scores - shift[:, None])
            correction = tl.exp2(row_max - shift)
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - new_max[:, None])
            correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(p, 1)
        acc = acc * correction[:, None]
        value = _tile(v, item, n, head_v, kv_len, stride_vb, stride_v, BLOCK_K, BLOCK_V, VALUE_DIM, DESCRIPTOR)
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _work_of(index, blocks, item_heads, together, CAUSAL: tl.constexpr):
    """Which head of all items a program attends for, and which of the ``blocks`` of its queries.

    Heads come one after the other, as the blocks of one read the same keys. Under causality the longest block of each
    comes first, and the last heads come ``together``, their longest blocks before any shorter one: else the last one's
    longest block would begin when nothing else is left for the chip.
    """
    head = index // blocks
    block = index % blocks
    if CAUSAL:
        first = tl.maximum(item_heads - together, 0)
        rest = index - first * blocks
        if rest >= 0:
            beside = item_heads - first
            head = first + rest % beside
            block = rest // beside
        block = blocks - 1 - block
    return head, block


@triton.jit(do_not_specialize=["item_heads", "together"])
def attention_kernel(
    q, k, v, out, key_padding, bounds,
    stride_qb, stride_qm, stride_kb, stride_k, stride_vb, stride_v, stride_ob, stride_om, stride_pb, stride_p,
    q_len, kv_len, item_heads, num_heads, together, scale,
    GROUP: tl.constexpr, PADDED: tl.constexpr, WINDOW_LEFT: tl.constexpr, WINDOW_RIGHT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head of one batch item.

    q, k, v and out are ``[items, len, heads * dim]``. The softmax is taken in base 2: ``scale`` includes log2(e).
    """
    take_turn()
    blocks = tl.cdiv(q_len, BLOCK_Q)
    causal: tl.constexpr = WINDOW_RIGHT >= 0
    item_head, block = _work_of(tl.program_id(0), blocks, item_heads, together, causal)
    item = item_head // num_heads
    head = item_head % num_heads
    m = block * BLOCK_Q
    queries = m + tl.arange(0, BLOCK_Q)
    head_k = (head // GROUP) * HEAD_DIM
    head_v = (head // GROUP) * VALUE_DIM
    query = _tile(q, item, m, head * HEAD_DIM, q_len, stride_qb, stride_qm, BLOCK_Q, BLOCK_D, HEAD_DIM, DESCRIPTOR)

    # Keys outside [start, stop) are invisible to the whole block, keys inside [whole_start, whole_stop) visible.
    start = 0
    stop = kv_len
    whole = True
    if PADDED:
        start = tl.load(bounds + item * 3)
        stop = tl.load(bounds + item * 3 + 1)
        whole = tl.load(bounds + item * 3 + 2) == stop - start
        key_padding += item * stride_pb
    whole_start = start
    whole_stop = stop
    if WINDOW_RIGHT >= 0:
        stop = tl.minimum(stop, m + BLOCK_Q + WINDOW_RIGHT)
        whole_stop = tl.minimum(whole_stop, m + WINDOW_RIGHT + 1)
    if WINDOW_LEFT >= 0:
        start = tl.maximum(start, m - WINDOW_LEFT)
        whole_start = tl.maximum(whole_start, tl.minimum(m + BLOCK_Q, q_len) - 1 - WINDOW_LEFT)
    start = (start // BLOCK_K) * BLOCK_K
    whole_start = tl.cdiv(whole_start, BLOCK_K) * BLOCK_K
    whole_stop = (whole_stop // BLOCK_K) * BLOCK_K
    if (whole_stop <= whole_start) | (not whole):
        whole_start = start
        whole_stop = start

    acc = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    if PADDED or WINDOW_LEFT >= 0:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, query, k, v, key_padding, item, start, whole_start, kv_len, head_k, head_v, queries,
            stride_kb, stride_k, stride_vb, stride_v, stride_p, scale, True, PADDED, WINDOW_LEFT, WINDOW_RIGHT, BLOCK_K,
            HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_V, DESCRIPTOR, PRECISION, STAGES,
        )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, query, k, v, key_padding, item, whole_start, whole_stop, kv_len, head_k, head_v, queries,
        stride_kb, stride_k, stride_vb, stride_v, stride_p, scale, False, PADDED, WINDOW_LEFT, WINDOW_RIGHT, BLOCK_K,
        HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_V, DESCRIPTOR, PRECISION, STAGES,
    )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, query, k, v, key_padding, item, whole_stop, stop, kv_len, head_k, head_v, queries,
        stride_kb, stride_k, stride_vb, stride_v, stride_p, scale, True, PADDED, WINDOW_LEFT, WINDOW_RIGHT, BLOCK_K,
        HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_V, DESCRIPTOR, PRECISION, STAGES,
    )  # fmt: skip

    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    columns = tl.arange(0, BLOCK_V)
    pointers = out + item.to(tl.int64) * stride_ob + queries[:, None].to(tl.int64) * stride_om
    pointers += head * VALUE_DIM + columns[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(queries[:, None] < q_len) & (columns[None, :] < VALUE_DIM))


def supported(head_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a configuration for these head sizes exists on this device."""
    return tile_of(target_of(device), max(head_dim, value_dim), dtype.itemsize) is not None


SPECIALISED_ROWS = {64: 192, 128: 128}
"""Head sizes that the kernel in Gluon is faster at, and the queries of its tiles. At 64 by 9 %, padded by 7 % (H200,
8192 keys); at 128 by 7 to 25 % (H100, 2048 to 16384)."""
SPECIALISED_KEYS = 2048
"""Fewer were not timed at heads of 128. At 64 it takes up to 46 % longer over 1024 and 512."""
EVEN_SHARE = 0.9
"""Share of the rounds that its tiles fill above which it takes heads of 64. At 0.86 and less the other kernel is as
fast or faster, by blocks of 64 queries and several programs a processor; at 0.97 this one (H200)."""


CACHED_BYTES = 32 * 2**20
"""Keys and values of so many bytes stay in an L2 (H200: 50 MiB) while all their queries pass."""
LAST_BLOCKS = 8
"""Blocks of queries a processor that the last heads of causal attention have, whose longest blocks come first."""


def is_specialised(target: Target, head_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernel in Gluon takes heads of these sizes, padded or not."""
    return speaks_gluon(target) and head_dim == value_dim in SPECIALISED_ROWS and dtype.itemsize == 2


def is_faster_specialised(target: Target, q: Tensor, kv_len: int, window: tuple[int, int]) -> bool:
    """Whether that kernel is the faster one, for heads that it takes.

    Heads of 64 are not attended to causally, and only where large tiles of their queries come out even.
    """
    items, q_len, heads, head_dim = q.shape
    if kv_len < SPECIALISED_KEYS:
        return False
    if head_dim == 128:
        return window in ((-1, -1), (-1, 0))
    rows = SPECIALISED_ROWS[head_dim]
    tiles = triton.cdiv(q_len, rows) * items * heads
    in_rounds = rows * triton.cdiv(tiles, target.processors) * target.processors
    return window == (-1, -1) and q_len * items * heads >= EVEN_SHARE * in_rounds


def heads_in_cache(k: Tensor, v: Tensor, heads: int) -> int:
    """How many query heads' keys and values, ``[items, kv_len, kv_heads, dim]`` of so many, stay in a GPU's L2."""
    head_bytes = k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()
    return max(1, CACHED_BYTES * heads // k.shape[2] // max(1, head_bytes))


def key_bounds(key_padding: Tensor) -> Tensor:
    """``[batch, 3]`` int32 of first visible key, one past the last, and their number, from ``[batch, kv_len]`` bool."""
    batch, kv_len = key_padding.shape
    bounds = key_padding.new_empty(batch, 3, dtype=torch.int32)
    launch(key_bounds_kernel, (batch, 1), key_padding, bounds, *key_padding.stride(), kv_len, BLOCK=1024)
    return bounds


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    key_padding: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    tile: Tile | None = None,
) -> None:
    """``out = softmax(scale * q @ k.T + mask) @ v``; a query that sees no key gives zeros.

    Args:
        q: ``[items, q_len, heads, head_dim]``, items of one size apart, heads adjacent; may be the memory of ``out``.
        k, v: ``[items, kv_len, kv_heads, head_dim or value_dim]``, laid out likewise.
        out: ``[items, q_len, heads, value_dim]``, laid out likewise.
        key_padding: ``[items, kv_len]`` bool, true where visible, and ``bounds``, its :func:`key_bounds`.
        scale: positive factor on the scores.
        window_left, window_right: key ``j`` is visible to query ``i`` when ``i - left <= j <= i + right``; -1 lifts a
            side.
        tile: overrides the table.
    """
    target, window = target_of(q.device), (window_left, window_right)
    head_dim, (kv_len, _, value_dim) = q.shape[3], v.shape[1:]
    how: dict[str, Any] = {"key_padding": key_padding, "bounds": bounds, "scale": scale}
    descriptor = target.descriptors and all(map(_is_describable, (q, k, v)))
    specialised = tile is None and descriptor and is_specialised(target, head_dim, value_dim, q.dtype)
    if specialised and is_faster_specialised(target, q, kv_len, window):
        from .attention_hopper import attention_hopper

        attention_hopper(q, k, v, out, causal=window_right == 0, **how)
        return
    how |= {"window_left": window_left, "window_right": window_right}
    tile = tile or _chosen_tile(target, q, k, v, out, descriptor, how)
    _launch(q, k, v, out, descriptor=descriptor, tile=tile, **how)


def _is_describable(heads: Tensor) -> bool:
    """Whether a descriptor may read heads, whose tiles are as wide as a head."""
    dim = heads.shape[3]
    return dim == head_columns(dim) and describable(by_items(heads))


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    key_padding: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    descriptor: bool,
    tile: Tile,
) -> None:
    """As :func:`attention`, by the kernel here, with descriptors or without."""
    (items, q_len, heads, head_dim), (kv_len, kv_heads, value_dim) = q.shape, v.shape[1:]
    target, block_d, block_v = target_of(q.device), head_columns(head_dim), head_columns(value_dim)
    blocks = triton.cdiv(q_len, tile.block_q)
    tensors = [by_items(tensor) for tensor in (q, k, v)]
    strides = [stride for tensor in tensors for stride in tensor.stride()[:2]]
    if descriptor:
        shapes = [(tile.block_q, block_d), (tile.block_k, block_d), (tile.block_k, block_v)]
        tensors = [TensorDescriptor.from_tensor(t, [1, *shape]) for t, shape in zip(tensors, shapes, strict=True)]
    last = LAST_BLOCKS * target.processors // max(1, blocks)
    together = 1 if window_left >= 0 else min(heads_in_cache(k, v, heads), last)
    triple = q.dtype == torch.float32 and triples(target, max(head_dim, value_dim))
    launch(
        attention_kernel,
        (blocks * items * heads, 1),
        *tensors,
        out,
        *((key_padding, bounds) if key_padding is not None else (out, out)),
        *strides,
        out.stride(0),
        out.stride(1),
        *(key_padding.stride() if key_padding is not None else (0, 0)),
        q_len,
        kv_len,
        items * heads,
        heads,
        together,
        scale * LOG2_E.value,
        GROUP=heads // kv_heads,
        PADDED=key_padding is not None,
        WINDOW_LEFT=window_left,
        WINDOW_RIGHT=window_right,
        BLOCK_Q=tile.block_q,
        BLOCK_K=tile.block_k,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        VALUE_DIM=value_dim,
        BLOCK_V=block_v,
        DESCRIPTOR=descriptor,
        PRECISION=TRIPLE if triple else precision_of(q.dtype),
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        overlapping=True,
    )


def _chosen_tile(
    target: Target, q: Tensor, k: Tensor, v: Tensor, out: Tensor, descriptor: bool, how: dict[str, Any]
) -> Tile:
    (items, q_len, heads, head_dim), (kv_len, kv_heads, value_dim) = q.shape, v.shape[1:]
    tile = tile_of(target, max(head_dim, value_dim), q.element_size())
    assert tile is not None, "ask supported() first"

    def run(tile: Tile) -> list[Tensor]:
        elsewhere = torch.empty_like(out)  # out may be q
        attention(q, k, v, elsewhere, **how, tile=tile)
        return [elsewhere]

    return tuned(
        "attention",
        [tile],
        run,
        q,
        items_and_heads=about(items * heads),
        q_len=about(q_len),
        kv_len=about(kv_len),
        head_dim=head_dim,
        value_dim=value_dim,
        group=heads // kv_heads,
        padded=how["key_padding"] is not None,
        window_left=how["window_left"],
        window_right=how["window_right"],
        descriptor=descriptor,
    )
