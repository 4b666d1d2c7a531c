"""Flash attention on Hopper, in Gluon: :mod:`.attention` without a window, its warps specialised.

One warp streams blocks of 128 keys and of their values through a ring in shared memory, from one tile to the next
without a break. Two warpgroups of 64 queries each consume them, and nothing makes them go in step. Each has the scores
of a block and the values of the block before multiplied at once, and takes the softmax of the former beside the latter
(FlashAttention-3, arXiv:2407.08608). Blocks before the first visible key and behind the last are not loaded.
"""

# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false
# Written for the Gluon of Triton 3.6.

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .activations import LOG2_E
from .launch import launch, take_turn
from .ring import SHARED_MEMORY, barriers, next_place, tiles_of
from .target import target_of
from .tiles import by_items

_ROWS = 64
"""Queries of a warpgroup."""
_BLOCK = 2 * _ROWS
"""Queries of a tile and keys of a block: of one size, so that without padding only a tile's last block needs a mask."""
_QUERY_PLACES = 2
_CACHED = 32 * 2**20
"""Bytes of keys and values that stay in the cache while all their queries pass."""
ROWS = gl.constexpr(_ROWS)
BLOCK = gl.constexpr(_BLOCK)
QUERY_PLACES = gl.constexpr(_QUERY_PLACES)


@gluon.jit
def _tile(index, padding, item_heads, together, heads, q_len, kv_len, CAUSAL: gl.constexpr, PADDED: gl.constexpr):
    """Item, head, first query, and first and last block of keys of a tile.

    Tiles of one item and head, which read the same keys, come in a row. Under causality the longest come first, of as
    many heads ``together`` as have keys and values in the cache.
    """
    tiles = gl.cdiv(q_len, BLOCK)
    if CAUSAL:
        first_head = index // (tiles * together) * together
        beside = gl.minimum(together, item_heads - first_head)
        index -= first_head * tiles
        m = (tiles - 1 - index // beside) * BLOCK
        item_head = first_head + index % beside
        stop = gl.minimum(kv_len, m + BLOCK)
    else:
        m = index % tiles * BLOCK
        item_head = index // tiles
        stop = kv_len
    item, head = item_head // heads, item_head % heads
    begin = 0
    if PADDED:
        bounds = padding[1] + item * 3
        begin = gl.load(bounds) // BLOCK
        stop = gl.minimum(stop, gl.load(bounds + 1))
    last = gl.cdiv(stop, BLOCK) - 1
    if PADDED:
        # A tile that sees no key gets the block behind all keys: zeros, which are not read from memory.
        sees = begin <= last
        behind = gl.cdiv(kv_len, BLOCK)
        begin = gl.where(sees, begin, behind)
        last = gl.where(sees, last, behind)
    return item, head, m, begin, last


@gluon.jit
def _row_of(padding, item, kv_len):
    """An item's key padding, its stride, and the block from which on only a tile's last needs a mask."""
    key_padding, bounds, stride_b, stride = padding
    bounds += item * 3
    first = gl.load(bounds)
    whole = gl.load(bounds + 2) == gl.load(bounds + 1) - first
    return key_padding + item * stride_b, stride, gl.cdiv(gl.where(whole, first, kv_len), BLOCK)


@gluon.jit
def _seen(row, stride, block, kv_len, layout: gl.constexpr):
    """Which keys of a block padding leaves visible."""
    keys = block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    return gl.load(row + keys * stride, mask=keys < kv_len, other=0)[None, :]


@gluon.jit
def _shift(row_max, scale, PADDED: gl.constexpr):
    """What is taken off the scaled scores of each row: their maximum; 0, to avoid inf - inf, where no key was seen."""
    shift = row_max * scale
    if PADDED:
        shift = gl.where(row_max == float("-inf"), 0.0, shift)
    return shift


@gluon.jit
def _load(source, item, row, column, ring, full, empty, place, parity, PLACES: gl.constexpr):
    """Fill a place of the ring, once it is empty, with a block of keys or values."""
    mbarrier.wait(empty.index(place), parity ^ 1)
    mbarrier.expect(full.index(place), source.block_type.nbytes)
    block = ring.index(place).reshape(source.block_type.shape)
    tma.async_copy_global_to_shared(source, [item, row, column], full.index(place), block)
    return next_place(place, parity, PLACES)


@gluon.jit
def _produce(q, k, v, queries, ring, full, empty, q_full, q_empty, first, programs, tiles, padding, item_heads,
             together, heads, q_len, kv_len, GROUP: gl.constexpr, DIM: gl.constexpr, CAUSAL: gl.constexpr,
             PADDED: gl.constexpr, PLACES: gl.constexpr):  # fmt: skip
    """Load all tiles of this program, last block first; a block's values come behind the keys of the block after."""
    place = 0
    parity = 0
    q_place = 0
    q_parity = 0
    for index in range(first, tiles, programs):
        item, head, m, begin, last = _tile(index, padding, item_heads, together, heads, q_len, kv_len, CAUSAL, PADDED)
        mbarrier.wait(q_empty.index(q_place), q_parity ^ 1)
        mbarrier.expect(q_full.index(q_place), 2 * q.block_type.nbytes)
        for i in gl.static_range(2):
            some = queries.index(2 * q_place + i).reshape(q.block_type.shape)
            tma.async_copy_global_to_shared(q, [item, m + i * ROWS, head * DIM], q_full.index(q_place), some)
        q_place, q_parity = next_place(q_place, q_parity, QUERY_PLACES)
        column = head // GROUP * DIM
        row = last * BLOCK
        place, parity = _load(k, item, row, column, ring, full, empty, place, parity, PLACES)
        for _ in range(begin, last):
            place, parity = _load(k, item, row - BLOCK, column, ring, full, empty, place, parity, PLACES)
            place, parity = _load(v, item, row, column, ring, full, empty, place, parity, PLACES)
            row -= BLOCK
        place, parity = _load(v, item, row, column, ring, full, empty, place, parity, PLACES)


@gluon.jit
def _consume(HALF: gl.constexpr, out, queries, ring, full, empty, q_full, q_empty, first, programs, tiles, padding,
             item_heads, together, heads, q_len, kv_len, stride_ob, stride_om, scale, DIM: gl.constexpr,
             CAUSAL: gl.constexpr, PADDED: gl.constexpr, PLACES: gl.constexpr):  # fmt: skip
    """Attend from one half of the queries of all tiles of this program."""
    over_keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    over_dims: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=over_dims, k_width=2)
    over_rows: gl.constexpr = gl.SliceLayout(1, over_dims)
    dtype: gl.constexpr = ring.dtype
    no_scores = gl.zeros([ROWS, BLOCK], gl.float32, layout=over_keys)
    place = 0
    parity = 0
    q_place = 0
    q_parity = 0
    for index in range(first, tiles, programs):
        item, head, m, begin, last = _tile(index, padding, item_heads, together, heads, q_len, kv_len, CAUSAL, PADDED)
        if PADDED:
            padding_row, stride, first_whole = _row_of(padding, item, kv_len)
            block = last
            seen = _seen(padding_row, stride, block, kv_len, over_keys)  # loads beside the wait for the keys
        query = queries.index(2 * q_place + HALF)
        mbarrier.wait(q_full.index(q_place), q_parity)
        mbarrier.wait(full.index(place), parity)
        product = warpgroup_mma(query, ring.index(place).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(product,))
        gl.thread_barrier()  # all four warps are through with what they read
        mbarrier.arrive(empty.index(place), count=1)
        place, parity = next_place(place, parity, PLACES)

        # Unless padding hides it, each query sees the first key of this block, as m is a multiple of BLOCK: no maximum
        # is -inf.
        keys = last * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, over_keys))
        if CAUSAL:
            rows = m + HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, over_keys))
            visible = keys[None, :] < gl.minimum(rows + 1, kv_len)[:, None]
        else:
            visible = (keys < kv_len)[None, :]
        if PADDED:
            visible &= seen
        scores = gl.where(visible, scores, float("-inf"))
        row_max = gl.max(scores, 1)
        weights = gl.exp2(scores * scale - _shift(row_max, scale, PADDED)[:, None])
        row_sum = gl.sum(weights, 1)
        weights = gl.convert_layout(weights.to(dtype), operand)
        acc = gl.zeros([ROWS, DIM], gl.float32, layout=over_dims)
        mbarrier.wait(full.index(place), parity)

        for _ in range(begin, last):
            product = warpgroup_mma(query, ring.index(place).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            v_place, v_parity = next_place(place, parity, PLACES)
            mbarrier.wait(full.index(v_place), v_parity)
            sums = warpgroup_mma(weights, ring.index(v_place), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(product,))
            gl.thread_barrier()
            mbarrier.arrive(empty.index(place), count=1)
            if PADDED:
                block -= 1
                if block < first_whole:
                    scores = gl.where(_seen(padding_row, stride, block, kv_len, over_keys), scores, float("-inf"))
            new_max = gl.maximum(row_max, gl.max(scores, 1))
            shift = _shift(new_max, scale, PADDED)
            new_weights = gl.exp2(scores * scale - shift[:, None])
            decay = gl.exp2(row_max * scale - shift)
            row_sum = row_sum * decay + gl.sum(new_weights, 1)
            row_max = new_max
            new_weights = new_weights.to(dtype)
            place, parity = next_place(v_place, v_parity, PLACES)
            # Before the wait for the products: the assembler moves that above the softmax, but not across a branch.
            mbarrier.wait(full.index(place), parity)
            acc, weights, new_weights = warpgroup_mma_wait(0, deps=(sums, weights, new_weights))
            gl.thread_barrier()
            mbarrier.arrive(empty.index(v_place), count=1)
            acc = acc * gl.convert_layout(decay, over_rows)[:, None]
            weights = gl.convert_layout(new_weights, operand)

        mbarrier.arrive(q_empty.index(q_place), count=1)
        q_place, q_parity = next_place(q_place, q_parity, QUERY_PLACES)
        sums = warpgroup_mma(weights, ring.index(place), acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=(sums, weights))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(place), count=1)
        place, parity = next_place(place, parity, PLACES)

        if PADDED:
            row_sum = gl.where(row_sum == 0.0, 1.0, row_sum)
        acc = acc * gl.convert_layout(1.0 / row_sum, over_rows)[:, None]
        rows = m + HALF * ROWS + gl.arange(0, ROWS, layout=over_rows)
        columns = gl.arange(0, DIM, layout=gl.SliceLayout(0, over_dims))
        pointers = out + item.to(gl.int64) * stride_ob + rows[:, None].to(gl.int64) * stride_om
        gl.store(pointers + head * DIM + columns[None, :], acc.to(dtype), mask=(rows < q_len)[:, None])


@gluon.jit
def attention_hopper_kernel(
    q, k, v, out, key_padding, bounds, stride_ob, stride_om, stride_pb, stride_p, tiles, item_heads, together, heads,
    q_len, kv_len, scale, GROUP: gl.constexpr, DIM: gl.constexpr, CAUSAL: gl.constexpr, PADDED: gl.constexpr,
    PLACES: gl.constexpr,
):  # fmt: skip
    """As :func:`~.attention.attention_kernel`, every ``num_programs``-th tile of 128 queries of a head."""
    of_queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], q.dtype)
    of_keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, DIM], k.dtype)
    queries = gl.allocate_shared_memory(q.dtype, [2 * QUERY_PLACES, ROWS, DIM], of_queries)
    ring = gl.allocate_shared_memory(k.dtype, [PLACES, BLOCK, DIM], of_keys)
    full, empty = barriers(PLACES, 1), barriers(PLACES, 2)
    q_full, q_empty = barriers(QUERY_PLACES, 1), barriers(QUERY_PLACES, 2)
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    padding = (key_padding, bounds, stride_pb, stride_p) if PADDED else ()
    take_turn()
    gl.warp_specialize(
        [
            (_consume, (0, out, queries, ring, full, empty, q_full, q_empty, first, programs, tiles, padding,
                        item_heads, together, heads, q_len, kv_len, stride_ob, stride_om, scale, DIM, CAUSAL, PADDED,
                        PLACES)),
            (_consume, (1, out, queries, ring, full, empty, q_full, q_empty, first, programs, tiles, padding,
                        item_heads, together, heads, q_len, kv_len, stride_ob, stride_om, scale, DIM, CAUSAL, PADDED,
                        PLACES)),
            (_produce, (q, k, v, queries, ring, full, empty, q_full, q_empty, first, programs, tiles, padding,
                        item_heads, together, heads, q_len, kv_len, GROUP, DIM, CAUSAL, PADDED, PLACES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def attention_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    scale: float,
    causal: bool,
    key_padding: Tensor | None = None,
    bounds: Tensor | None = None,
) -> None:
    """``out = softmax(scale * q @ k.T + mask) @ v``; a query that sees no key gives zeros.

    Args:
        q: ``[items, q_len, heads, dim]``, half precision, ``dim`` 64 or 128, items of one size apart, heads adjacent,
            addresses and rows 16-byte aligned; may be the memory of ``out``.
        k, v: ``[items, kv_len, kv_heads, dim]``, laid out likewise; at least one key.
        out: ``[items, q_len, heads, dim]``, laid out likewise.
        scale: positive factor on the scores.
        causal: key ``j`` is visible to query ``i`` when ``j <= i``; else all are.
        key_padding: ``[items, kv_len]`` bool, true where visible, and ``bounds``, its :func:`~.attention.key_bounds`.
    """
    items, q_len, heads, dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    views = [tiles_of(by_items(tensor), [1, rows, dim]) for tensor, rows in ((q, _ROWS), (k, _BLOCK), (v, _BLOCK))]
    tiles = triton.cdiv(q_len, _BLOCK) * items * heads
    block_bytes = _BLOCK * dim * q.element_size()
    launch(
        attention_hopper_kernel,
        (min(tiles, target_of(q.device).processors), 1),
        *views,
        out,
        *((key_padding, bounds) if key_padding is not None else (out, out)),
        out.stride(0),
        out.stride(1),
        *(key_padding.stride() if key_padding is not None else (0, 0)),
        tiles,
        items * heads,
        max(1, _CACHED * heads // kv_heads // (2 * kv_len * dim * q.element_size())),
        heads,
        q_len,
        kv_len,
        scale * LOG2_E.value,
        GROUP=heads // kv_heads,
        DIM=dim,
        CAUSAL=causal,
        PADDED=key_padding is not None,
        PLACES=(SHARED_MEMORY - _QUERY_PLACES * block_bytes) // block_bytes,
        num_warps=4,
        maxnreg=168,
        overlapping=True,
    )
