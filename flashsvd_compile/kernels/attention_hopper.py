"""Flash attention on Hopper, in Gluon: :mod:`.attention` without a window, its warps specialised.

One warp streams blocks of 128 keys and of their values through a ring in shared memory, from one tile to the next
without a break. Warpgroups of 64 queries each consume them, as many as registers have room for, and nothing makes them
go in step. Blocks before the first visible key and behind the last are not loaded.

What one warpgroup does beside the softmax of a block depends on the head's size. At 128 it has the values of the block
before multiplied (FlashAttention-3, arXiv:2407.08608). At 64 there are three warpgroups, whose registers do not hold
the weights of two blocks: it takes the softmax by halves, one beside the product of the other with its values, and has
the second half's values and the next block's scores multiplied in one go.
"""

# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .activations import LOG2_E
from .attention import SPECIALISED_ROWS, heads_in_cache
from .dialect import async_load, wait_for_threads
from .launch import launch, take_turn
from .ring import SHARED_MEMORY, barriers, next_place, tiles_of
from .target import target_of
from .tiles import by_items

_ROWS = 64
"""Queries of a warpgroup."""
_BLOCK = 128
"""Keys of a block."""
_REGISTERS = {64: (128, 160), 128: (168, 240)}
"""Registers of a thread, by head size: when a program begins, and in a warpgroup that multiplies."""
_QUERY_PLACES = 2
ROWS = gl.constexpr(_ROWS)
BLOCK = gl.constexpr(_BLOCK)
QUERY_PLACES = gl.constexpr(_QUERY_PLACES)


@gluon.constexpr_function
def _over(columns):
    """Layout of what a warpgroup multiplies, by its columns."""
    return gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def _tile(index, work, padding, TILE: gl.constexpr, CAUSAL: gl.constexpr, PADDED: gl.constexpr):
    """Item, head, first query, and first and last block of keys of a tile of so many queries.

    Tiles of one item and head, which read the same keys, come in a row. Under causality as many heads come ``together``
    as have keys and values in the cache: their longest tiles first, and of every other such group the shortest.
    """
    item_heads, heads, together, q_len, kv_len = work
    tiles = gl.cdiv(q_len, TILE)
    if CAUSAL:
        group = index // (tiles * together)
        first_head = group * together
        beside = gl.minimum(together, item_heads - first_head)
        index -= first_head * tiles
        index = gl.where(group % 2 == 0, index, tiles * beside - 1 - index)
        m = (tiles - 1 - index // beside) * TILE
        item_head = first_head + index % beside
        stop = gl.minimum(kv_len, m + TILE)
    else:
        m = index % tiles * TILE
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
def _tile_of(turn, first, programs):
    """Which tile a program takes in its turn: every other round backwards, so that long tiles and short ones pair."""
    return turn * programs + gl.where(turn % 2 == 0, first, programs - 1 - first)


@gluon.jit
def _turns(tiles):
    """First tile of this program, programs, and how many turns it has."""
    first, programs = gl.program_id(0), gl.num_programs(0)
    rounds = tiles // programs
    return first, programs, rounds + (_tile_of(rounds, first, programs) < tiles).to(gl.int32)


@gluon.jit
def _row_of(padding, item, kv_len):
    """An item's key padding, its stride, and the block from which on only a tile's last needs it."""
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
def _hide(scores, block, hidden, PADDED: gl.constexpr):
    """Scores of a block that is not a tile's last, -inf where padding hides a key."""
    if PADDED:
        row, stride, first_whole, kv_len = hidden
        if block < first_whole:
            scores = gl.where(_seen(row, stride, block, kv_len, _over(BLOCK)), scores, float("-inf"))
    return scores


@gluon.jit
def _release(empty, place):
    """Give a place of the ring back, once all four warps are through with what they read."""
    wait_for_threads()
    mbarrier.arrive(empty.index(place), count=1)


@gluon.jit
def _with_values(acc, weights, keys_ring, place, parity, PLACES: gl.constexpr):
    """``acc`` and the weighted values in a place of the ring, which is given back, and the place after."""
    ring, _, empty = keys_ring
    sums = warpgroup_mma(weights, ring.index(place), acc, is_async=True)
    acc, weights = warpgroup_mma_wait(0, deps=(sums, weights))
    _release(empty, place)
    place, parity = next_place(place, parity, PLACES)
    return acc, place, parity


@gluon.jit
def _load(source, item, row, column, ring, full, empty, place, parity, PLACES: gl.constexpr):
    """Fill a place of the ring, once it is empty, with a block of keys or values."""
    mbarrier.wait(empty.index(place), parity ^ 1)
    mbarrier.expect(full.index(place), source.block_type.nbytes)
    block = ring.index(place).reshape(source.block_type.shape)
    async_load(source, [item, row, column], full.index(place), block)
    return next_place(place, parity, PLACES)


@gluon.jit
def _produce(q, k, v, queries_ring, keys_ring, turns, work, padding, GROUP: gl.constexpr, DIM: gl.constexpr,
             CAUSAL: gl.constexpr, PADDED: gl.constexpr, PLACES: gl.constexpr, WARPGROUPS: gl.constexpr):  # fmt: skip
    """Load all tiles of this program, last block first; a block's values come behind the keys of the block after."""
    TILE: gl.constexpr = ROWS * WARPGROUPS
    queries, q_full, q_empty = queries_ring
    ring, full, empty = keys_ring
    first, programs, count = turns
    place = 0
    parity = 0
    q_place = 0
    q_parity = 0
    for turn in range(count):
        index = _tile_of(turn, first, programs)
        item, head, m, begin, last = _tile(index, work, padding, TILE, CAUSAL, PADDED)
        mbarrier.wait(q_empty.index(q_place), q_parity ^ 1)
        mbarrier.expect(q_full.index(q_place), WARPGROUPS * q.block_type.nbytes)
        for i in gl.static_range(WARPGROUPS):
            some = queries.index(WARPGROUPS * q_place + i).reshape(q.block_type.shape)
            async_load(q, [item, m + i * ROWS, head * DIM], q_full.index(q_place), some)
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
def _values_of_last_beside(scores, query, keys_ring, place, parity, last, begin, hidden, scale, DIM: gl.constexpr,
                           PADDED: gl.constexpr, PLACES: gl.constexpr):  # fmt: skip
    """Attend to blocks ``last .. begin`` from the scores of the last; the softmax beside the values of a block before.

    Returns what is summed up, by rows the weights' sums, and where the ring stands.
    """
    over_dims: gl.constexpr = _over(DIM)
    over_rows: gl.constexpr = gl.SliceLayout(1, over_dims)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=over_dims, k_width=2)
    ring, full, empty = keys_ring
    no_scores = gl.zeros([ROWS, BLOCK], gl.float32, layout=_over(BLOCK))
    row_max = gl.max(scores, 1)
    weights = gl.exp2(scores * scale - _shift(row_max, scale, PADDED)[:, None])
    row_sum = gl.sum(weights, 1)
    weights = gl.convert_layout(weights.to(ring.dtype), operand)
    acc = gl.zeros([ROWS, DIM], gl.float32, layout=over_dims)
    mbarrier.wait(full.index(place), parity)
    block = last
    for _ in range(begin, last):
        product = warpgroup_mma(query, ring.index(place).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        v_place, v_parity = next_place(place, parity, PLACES)
        mbarrier.wait(full.index(v_place), v_parity)
        sums = warpgroup_mma(weights, ring.index(v_place), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(product,))
        _release(empty, place)
        block -= 1
        scores = _hide(scores, block, hidden, PADDED)
        new_max = gl.maximum(row_max, gl.max(scores, 1))
        shift = _shift(new_max, scale, PADDED)
        new_weights = gl.exp2(scores * scale - shift[:, None])
        decay = gl.exp2(row_max * scale - shift)
        row_sum = row_sum * decay + gl.sum(new_weights, 1)
        row_max = new_max
        new_weights = new_weights.to(ring.dtype)
        place, parity = next_place(v_place, v_parity, PLACES)
        # Before the wait for the products: the assembler moves that above the softmax, but not across a branch.
        mbarrier.wait(full.index(place), parity)
        acc, weights, new_weights = warpgroup_mma_wait(0, deps=(sums, weights, new_weights))
        _release(empty, v_place)
        acc = acc * gl.convert_layout(decay, over_rows)[:, None]
        weights = gl.convert_layout(new_weights, operand)
    acc, place, parity = _with_values(acc, weights, keys_ring, place, parity, PLACES)
    return acc, row_sum, place, parity


@gluon.jit
def _values_by_halves(scores, query, keys_ring, place, parity, last, begin, hidden, scale, DIM: gl.constexpr,
                      PADDED: gl.constexpr, PLACES: gl.constexpr):  # fmt: skip
    """The same, half the softmax of a block beside the values of its other half, which takes fewer registers."""
    over_half: gl.constexpr = _over(BLOCK // 2)
    half_rows: gl.constexpr = gl.SliceLayout(1, over_half)
    over_dims: gl.constexpr = _over(DIM)
    over_rows: gl.constexpr = gl.SliceLayout(1, over_dims)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=over_dims, k_width=2)
    half: gl.constexpr = BLOCK // 2
    ring, full, empty = keys_ring
    no_scores = gl.zeros([ROWS, BLOCK], gl.float32, layout=_over(BLOCK))
    row_max = gl.max(scores, 1)
    row_sum = gl.zeros([ROWS], gl.float32, layout=half_rows)
    acc = gl.zeros([ROWS, DIM], gl.float32, layout=over_dims)
    block = last
    for _ in range(begin, last):
        v_place, v_parity = next_place(place, parity, PLACES)
        some, others = scores.reshape([ROWS, 2, half]).permute((0, 2, 1)).split()
        shift = gl.convert_layout(_shift(row_max, scale, PADDED), half_rows)[:, None]
        some = gl.exp2(gl.convert_layout(some, over_half, assert_trivial=True) * scale - shift)
        row_sum += gl.sum(some, 1)
        some = gl.convert_layout(some.to(ring.dtype), operand)
        mbarrier.wait(full.index(v_place), v_parity)
        sums = warpgroup_mma(some, ring.index(v_place).slice(0, half), acc, is_async=True)
        others = gl.exp2(gl.convert_layout(others, over_half, assert_trivial=True) * scale - shift)
        row_sum += gl.sum(others, 1)
        others = gl.convert_layout(others.to(ring.dtype), operand)
        sums = warpgroup_mma(others, ring.index(v_place).slice(half, half), sums, is_async=True)
        mbarrier.wait(full.index(place), parity)
        product = warpgroup_mma(query, ring.index(place).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        acc, some, others = warpgroup_mma_wait(1, deps=(sums, some, others))
        scores = warpgroup_mma_wait(0, deps=(product,))
        _release(empty, place)
        mbarrier.arrive(empty.index(v_place), count=1)
        block -= 1
        scores = _hide(scores, block, hidden, PADDED)
        new_max = gl.maximum(row_max, gl.max(scores, 1))
        decay = gl.exp2(row_max * scale - _shift(new_max, scale, PADDED))
        row_sum *= gl.convert_layout(decay, half_rows)
        row_max = new_max
        acc = acc * gl.convert_layout(decay, over_rows)[:, None]
        place, parity = next_place(v_place, v_parity, PLACES)
    weights = gl.exp2(scores * scale - _shift(row_max, scale, PADDED)[:, None])
    row_sum += gl.convert_layout(gl.sum(weights, 1), half_rows)
    weights = gl.convert_layout(weights.to(ring.dtype), operand)
    mbarrier.wait(full.index(place), parity)
    acc, place, parity = _with_values(acc, weights, keys_ring, place, parity, PLACES)
    return acc, row_sum, place, parity


@gluon.jit
def _consume(PART: gl.constexpr, out, strides, scale, queries_ring, keys_ring, turns, work, padding,
             DIM: gl.constexpr, CAUSAL: gl.constexpr, PADDED: gl.constexpr, PLACES: gl.constexpr,
             WARPGROUPS: gl.constexpr):  # fmt: skip
    """Attend from one warpgroup's part of the queries of all tiles of this program."""
    over_keys: gl.constexpr = _over(BLOCK)
    over_rows: gl.constexpr = gl.SliceLayout(1, _over(DIM))
    queries, q_full, q_empty = queries_ring
    ring, full, empty = keys_ring
    first, programs, count = turns
    q_len, kv_len = work[3], work[4]
    no_scores = gl.zeros([ROWS, BLOCK], gl.float32, layout=over_keys)
    place = 0
    parity = 0
    q_place = 0
    q_parity = 0
    for turn in range(count):
        index = _tile_of(turn, first, programs)
        item, head, m, begin, last = _tile(index, work, padding, ROWS * WARPGROUPS, CAUSAL, PADDED)
        m += PART * ROWS
        if PADDED:
            row, stride, first_whole = _row_of(padding, item, kv_len)
            hidden = (row, stride, first_whole, kv_len)
            seen = _seen(row, stride, last, kv_len, over_keys)  # loads beside the wait for the keys
        else:
            hidden = ()
        query = queries.index(WARPGROUPS * q_place + PART)
        mbarrier.wait(q_full.index(q_place), q_parity)
        mbarrier.wait(full.index(place), parity)
        product = warpgroup_mma(query, ring.index(place).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(product,))
        _release(empty, place)
        place, parity = next_place(place, parity, PLACES)

        # Unless padding hides it, each query sees the first key of this block, also under causality, where tiles are
        # of BLOCK queries: no maximum is -inf.
        keys = last * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, over_keys))
        if CAUSAL:
            rows = m + gl.arange(0, ROWS, layout=gl.SliceLayout(1, over_keys))
            visible = keys[None, :] < gl.minimum(rows + 1, kv_len)[:, None]
        else:
            visible = (keys < kv_len)[None, :]
        if PADDED:
            visible &= seen
        scores = gl.where(visible, scores, float("-inf"))
        if WARPGROUPS == 2:
            acc, row_sum, place, parity = _values_of_last_beside(
                scores, query, keys_ring, place, parity, last, begin, hidden, scale, DIM, PADDED, PLACES
            )
        else:
            acc, row_sum, place, parity = _values_by_halves(
                scores, query, keys_ring, place, parity, last, begin, hidden, scale, DIM, PADDED, PLACES
            )
        mbarrier.arrive(q_empty.index(q_place), count=1)
        q_place, q_parity = next_place(q_place, q_parity, QUERY_PLACES)

        if PADDED:
            row_sum = gl.where(row_sum == 0.0, 1.0, row_sum)
        acc = acc * gl.convert_layout(1.0 / row_sum, over_rows)[:, None]
        rows = m + gl.arange(0, ROWS, layout=over_rows)
        columns = gl.arange(0, DIM, layout=gl.SliceLayout(0, _over(DIM)))
        pointers = out + item.to(gl.int64) * strides[0] + rows[:, None].to(gl.int64) * strides[1]
        gl.store(pointers + head * DIM + columns[None, :], acc.to(ring.dtype), mask=(rows < q_len)[:, None])


@gluon.jit(do_not_specialize=["tiles", "item_heads", "together"])
def attention_hopper_kernel(
    q, k, v, out, key_padding, bounds, stride_ob, stride_om, stride_pb, stride_p, tiles, item_heads, together, heads,
    q_len, kv_len, scale, GROUP: gl.constexpr, DIM: gl.constexpr, CAUSAL: gl.constexpr, PADDED: gl.constexpr,
    PLACES: gl.constexpr, WARPGROUPS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """As :func:`~.attention.attention_kernel`, a tile of the queries of a head in each turn of a program."""
    of_queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], q.dtype)
    of_keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, DIM], k.dtype)
    queries = gl.allocate_shared_memory(q.dtype, [WARPGROUPS * QUERY_PLACES, ROWS, DIM], of_queries)
    ring = gl.allocate_shared_memory(k.dtype, [PLACES, BLOCK, DIM], of_keys)
    queries_ring = (queries, barriers(QUERY_PLACES, 1), barriers(QUERY_PLACES, WARPGROUPS))
    keys_ring = (ring, barriers(PLACES, 1), barriers(PLACES, WARPGROUPS))
    turns = _turns(tiles)
    work = (item_heads, heads, together, q_len, kv_len)
    padding = (key_padding, bounds, stride_pb, stride_p) if PADDED else ()
    strides = (stride_ob, stride_om)
    take_turn()
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, out, strides, scale, queries_ring, keys_ring, turns, work, padding, DIM, CAUSAL, PADDED,
                            PLACES, WARPGROUPS)),
                (_consume, (1, out, strides, scale, queries_ring, keys_ring, turns, work, padding, DIM, CAUSAL, PADDED,
                            PLACES, WARPGROUPS)),
                (_produce, (q, k, v, queries_ring, keys_ring, turns, work, padding, GROUP, DIM, CAUSAL, PADDED, PLACES,
                            WARPGROUPS)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (0, out, strides, scale, queries_ring, keys_ring, turns, work, padding, DIM, CAUSAL, PADDED,
                            PLACES, WARPGROUPS)),
                (_consume, (1, out, strides, scale, queries_ring, keys_ring, turns, work, padding, DIM, CAUSAL, PADDED,
                            PLACES, WARPGROUPS)),
                (_consume, (2, out, strides, scale, queries_ring, keys_ring, turns, work, padding, DIM, CAUSAL, PADDED,
                            PLACES, WARPGROUPS)),
                (_produce, (q, k, v, queries_ring, keys_ring, turns, work, padding, GROUP, DIM, CAUSAL, PADDED, PLACES,
                            WARPGROUPS)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
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
        causal: key ``j`` is visible to query ``i`` when ``j <= i``, which only heads of 128 can do; else all are.
        key_padding: ``[items, kv_len]`` bool, true where visible, and ``bounds``, its :func:`~.attention.key_bounds`.

    Raises:
        ValueError: causal heads of 64.
    """
    items, q_len, heads, dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    views = [tiles_of(by_items(tensor), [1, rows, dim]) for tensor, rows in ((q, _ROWS), (k, _BLOCK), (v, _BLOCK))]
    rows = SPECIALISED_ROWS[dim]
    if causal and rows != _BLOCK:
        raise ValueError(f"heads of {dim} are not attended to causally, only heads of 128")
    tiles = triton.cdiv(q_len, rows) * items * heads
    at_first, multiplying = _REGISTERS[dim]
    row_bytes = dim * q.element_size()
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
        heads_in_cache(k, v, heads),
        heads,
        q_len,
        kv_len,
        scale * LOG2_E.value,
        GROUP=heads // kv_heads,
        DIM=dim,
        CAUSAL=causal,
        PADDED=key_padding is not None,
        PLACES=(SHARED_MEMORY - _QUERY_PLACES * rows * row_bytes) // (_BLOCK * row_bytes),
        WARPGROUPS=rows // _ROWS,
        REGISTERS=multiplying,
        num_warps=4,
        maxnreg=at_first,
        overlapping=True,
    )
