"""Up to three low-rank projections of the same rows on Hopper, in Gluon: :mod:`.projection` with its warps specialised.

    out_j = (x @ down_j.T + down_bias_j) @ up_j.T + up_bias_j        for up to three j

One warp streams 64 columns of ``x`` with those of ``down``, then 64 rows of ``up`` at a time, through a ring in shared
memory, from one tile to the next without a break. Two warpgroups consume them, and nothing makes them go in step: each
keeps its rows of rank space in registers, where the second product reads them. Results leave through shared memory, as
whole lines.

What bounds it beside the matrix units are bytes, of shared memory and of the L2: so rank space is cut into products as
wide as can be, and where there are rows enough a warpgroup takes 128 of them, which halves what is read of the weights.
"""

# ruff: noqa: RUF005 - Gluon has no starred expressions
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .dialect import async_load, async_store, seen_as, wait_for_threads
from .launch import launch, take_turn
from .projection import Map
from .ring import SHARED_MEMORY, barriers, next_place, tiles_of
from .target import target_of
from .tiles import pieces

_SIDE = 64
"""Rows and columns of a tile of ``x`` or of a result: 128 bytes a row, which is what the memory's swizzle spans."""
_WIDE = {1: 192, 2: 144, 3: 0}
"""Columns of rank space up to which the registers of a warpgroup hold it for 128 rows, by the number of maps."""
SIDE = gl.constexpr(_SIDE)


@gluon.jit
def _of(which, values, MAPS: gl.constexpr):
    """A map's value among those of all maps."""
    value = values[0]
    for i in gl.static_range(1, MAPS):
        value = gl.where(which == i, values[i], value)
    return value


@gluon.jit
def _tile(index, widths, ROWS: gl.constexpr, MAPS: gl.constexpr):
    """First row, map and its width of a tile; the maps of one block of rows come in a row and share it in the cache."""
    which = index % MAPS
    return index // MAPS * ROWS, which, _of(which, widths, MAPS)


@gluon.jit
def _places(dtype: gl.constexpr, WIDTH: gl.constexpr, PLACES: gl.constexpr):
    """The ring of a piece of rank space: in each place ``WIDTH`` rows of ``down`` and 64 columns."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WIDTH, SIDE], dtype)
    return gl.allocate_shared_memory(dtype, [PLACES, WIDTH, SIDE], layout)


@gluon.jit
def _of_up(ring):
    """The same places for 64 rows of ``up``."""
    PLACES: gl.constexpr = ring.shape[0]
    WIDTH: gl.constexpr = ring.shape[1]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, WIDTH], ring.dtype)
    return seen_as(ring, [PLACES, SIDE, WIDTH], layout)


@gluon.jit
def _load(matrices, p: gl.constexpr, which, row, column, barrier, tile, MAPS: gl.constexpr):
    """Load a tile of the ``p``-th piece of a map's matrix."""
    for i in gl.static_range(MAPS):
        if which == i:
            async_load(matrices[i][p], [row, column], barrier, tile)


@gluon.jit
def _produce(x, downs, ups, ring_x, rings, full, empty, first, programs, tiles, depth, widths, R0: gl.constexpr,
             R1: gl.constexpr, R2: gl.constexpr, HEIGHT: gl.constexpr, MAPS: gl.constexpr,
             PLACES: gl.constexpr):  # fmt: skip
    """Load all tiles of this program.

    Programs start at different columns: in step they would all wait for the same lines of the cache.
    """
    starts: gl.constexpr = (0, R0, R0 + R1)
    count: gl.constexpr = 1 + (R1 > 0) + (R2 > 0)
    width_of_all: gl.constexpr = R0 + R1 + R2
    place = 0
    parity = 0
    steps = gl.cdiv(depth, SIDE)
    for index in range(first, tiles, programs):
        n, which, width = _tile(index, widths, 2 * HEIGHT * SIDE, MAPS)
        d = index % steps * SIDE
        for _ in range(steps):
            mbarrier.wait(empty.index(place), parity ^ 1)
            barrier = full.index(place)
            mbarrier.expect(barrier, (2 * HEIGHT * SIDE + width_of_all) * SIDE * 2)
            for i in gl.static_range(2 * HEIGHT):
                async_load(x, [n + i * SIDE, d], barrier, ring_x.index(place * 2 * HEIGHT + i))
            for p in gl.static_range(count):
                _load(downs, p, which, starts[p], d, barrier, rings[p].index(place), MAPS)
            place, parity = next_place(place, parity, PLACES)
            d = gl.where(d + SIDE < depth, d + SIDE, 0)
        columns = gl.cdiv(width, SIDE)
        f = index % columns * SIDE
        for _ in range(columns):
            mbarrier.wait(empty.index(place), parity ^ 1)
            barrier = full.index(place)
            mbarrier.expect(barrier, width_of_all * SIDE * 2)
            for p in gl.static_range(count):
                _load(ups, p, which, f, starts[p], barrier, _of_up(rings[p]).index(place), MAPS)
            place, parity = next_place(place, parity, PLACES)
            f = gl.where(f + SIDE < width, f + SIDE, 0)


@gluon.jit
def _initial(bias, length, START: gl.constexpr, WIDTH: gl.constexpr, HAS_BIAS: gl.constexpr):
    """What 64 rows of a piece of rank space are added to."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    sums = gl.zeros([SIDE, WIDTH], gl.float32, layout=layout)
    if HAS_BIAS:
        r = START + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
        sums += gl.load(bias + r, mask=r < length, other=0.0).to(gl.float32)[None, :]
    return sums


@gluon.jit
def _rows_of_x(ring_x, place, INDEX: gl.constexpr, HEIGHT: gl.constexpr, IN_REGISTERS: gl.constexpr):
    """The ``INDEX``-th warpgroup's tiles of ``x``, as the first operand of a product."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, SIDE, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    tiles = ()
    for h in gl.static_range(HEIGHT):
        tile = ring_x.index((place * 2 + INDEX) * HEIGHT + h)
        tiles = tiles + ((tile.load(operand) if IN_REGISTERS else tile),)
    return tiles


@gluon.jit
def _to_rank_space(tiles, rings, place, sums, HEIGHT: gl.constexpr):
    """Begin to add the products of tiles of ``x`` with the step's columns of ``down``."""
    count: gl.constexpr = len(rings)
    products = ()
    for h in gl.static_range(HEIGHT):
        for p in gl.static_range(count):
            down = rings[p].index(place).permute((1, 0))
            products = products + (warpgroup_mma(tiles[h], down, sums[h * count + p], is_async=True),)
    return products


@gluon.jit
def _out_of_rank_space(latents, h: gl.constexpr, rings, place):
    """Begin to multiply 64 rows of rank space with the step's rows of ``up``."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, SIDE, 16])
    count: gl.constexpr = len(rings)
    zeros = gl.zeros([SIDE, SIDE], gl.float32, layout=layout)
    up = _of_up(rings[0]).index(place).permute((1, 0))
    result = warpgroup_mma(latents[h * count], up, zeros, use_acc=False, is_async=True)
    for p in gl.static_range(1, count):
        up = _of_up(rings[p]).index(place).permute((1, 0))
        result = warpgroup_mma(latents[h * count + p], up, result, is_async=True)
    return result


@gluon.jit
def _bias_of(bias, start, length, HAS_BIAS: gl.constexpr):
    """The addends of 64 columns of a result."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, SIDE, 16])
    columns = start + gl.arange(0, SIDE, layout=gl.SliceLayout(0, layout))
    if HAS_BIAS:
        return gl.load(bias + columns, mask=columns < length, other=0.0)
    else:
        return columns


@gluon.jit
def _rounded(result, addend, dtype: gl.constexpr, HAS_BIAS: gl.constexpr):
    """A result with its bias, in the dtype of the matrices."""
    if HAS_BIAS:
        result += addend.to(gl.float32)[None, :]
    return result.to(dtype)


@gluon.jit
def _store(result, outs, which, row, column, staging, MAPS: gl.constexpr):
    """Write a tile of a result, once the one before has left the staging memory; what is outside is clipped."""
    tma.store_wait(0)
    wait_for_threads()
    staging.store(result)
    fence_async_shared()
    wait_for_threads()
    for i in gl.static_range(MAPS):
        if which == i:
            async_store(outs[i], [row, column], staging)


@gluon.jit
def _consume(INDEX: gl.constexpr, down_biases, up_biases, outs, ring_x, rings, full, empty, stagings, first, programs,
             tiles, depth, biased_ranks, biased_widths, widths, R0: gl.constexpr, R1: gl.constexpr, R2: gl.constexpr,
             HEIGHT: gl.constexpr, MAPS: gl.constexpr, HAS_DOWN_BIAS: gl.constexpr, HAS_UP_BIAS: gl.constexpr,
             AHEAD: gl.constexpr, PLACES: gl.constexpr):  # fmt: skip
    """Project the ``INDEX``-th half of the rows of all tiles of this program.

    The result may replace ``x``: a warpgroup writes its own rows only, all columns of which have arrived in the ring
    before it ends the first product; what is loaded ahead meanwhile are rows of other tiles.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, SIDE, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    in_registers: gl.constexpr = HEIGHT == 1
    cut: gl.constexpr = (R0, R1, R2)
    starts: gl.constexpr = (0, R0, R0 + R1)
    count: gl.constexpr = 1 + (R1 > 0) + (R2 > 0)
    dtype: gl.constexpr = ring_x.dtype
    staging = stagings.index(INDEX)
    steps = gl.cdiv(depth, SIDE)
    place = 0
    parity = 0
    for index in range(first, tiles, programs):
        n, which, width = _tile(index, widths, 2 * HEIGHT * SIDE, MAPS)
        n += INDEX * HEIGHT * SIDE
        down_bias = _of(which, down_biases, MAPS)
        biased_rank = _of(which, biased_ranks, MAPS)
        sums = ()
        for _ in gl.static_range(HEIGHT):
            for p in gl.static_range(count):
                sums = sums + (_initial(down_bias, biased_rank, starts[p], cut[p], HAS_DOWN_BIAS),)

        mbarrier.wait(full.index(place), parity)
        rows = _rows_of_x(ring_x, place, INDEX, HEIGHT, in_registers)
        for _ in range(steps - 1):
            products = _to_rank_space(rows, rings, place, sums, HEIGHT)
            after, after_parity = next_place(place, parity, PLACES)
            mbarrier.wait(full.index(after), after_parity)
            rows_after = _rows_of_x(ring_x, after, INDEX, HEIGHT, in_registers)
            if in_registers:
                sums = warpgroup_mma_wait(0, deps=products + rows)[: HEIGHT * count]
            else:
                sums = warpgroup_mma_wait(0, deps=products)
            wait_for_threads()  # all four warps are through with what they read
            mbarrier.arrive(empty.index(place), count=1)
            place, parity, rows = after, after_parity, rows_after
        products = _to_rank_space(rows, rings, place, sums, HEIGHT)
        if in_registers:
            sums = warpgroup_mma_wait(0, deps=products + rows)[: HEIGHT * count]
        else:
            sums = warpgroup_mma_wait(0, deps=products)
        wait_for_threads()
        mbarrier.arrive(empty.index(place), count=1)
        place, parity = next_place(place, parity, PLACES)

        if AHEAD:  # noqa: SIM102 - this one when compiled, the other when run
            if index == first:
                take_turn()
        latents = ()
        for i in gl.static_range(HEIGHT * count):
            latents = latents + (gl.convert_layout(sums[i].to(dtype), operand),)
        up_bias = _of(which, up_biases, MAPS)
        biased_width = _of(which, biased_widths, MAPS)
        steps_out = gl.cdiv(width, SIDE)
        f = index % steps_out * SIDE
        mbarrier.wait(full.index(place), parity)
        product = _out_of_rank_space(latents, 0, rings, place)
        for _ in range(steps_out - 1):
            addend = _bias_of(up_bias, f, biased_width, HAS_UP_BIAS)
            for h in gl.static_range(HEIGHT):
                result = _rounded(warpgroup_mma_wait(0, deps=(product,)), addend, dtype, HAS_UP_BIAS)
                # The next product begins before this one's result is stored.
                if h + 1 < HEIGHT:
                    product = _out_of_rank_space(latents, h + 1, rings, place)
                else:
                    wait_for_threads()
                    mbarrier.arrive(empty.index(place), count=1)
                    place, parity = next_place(place, parity, PLACES)
                    mbarrier.wait(full.index(place), parity)
                    product = _out_of_rank_space(latents, 0, rings, place)
                _store(result, outs, which, n + h * SIDE, f, staging, MAPS)
            f = gl.where(f + SIDE < width, f + SIDE, 0)
        addend = _bias_of(up_bias, f, biased_width, HAS_UP_BIAS)
        for h in gl.static_range(HEIGHT):
            if h + 1 < HEIGHT:
                result = _rounded(warpgroup_mma_wait(0, deps=(product,)), addend, dtype, HAS_UP_BIAS)
                product = _out_of_rank_space(latents, h + 1, rings, place)
            else:
                last = warpgroup_mma_wait(0, deps=(product,) + latents)[0]
                wait_for_threads()
                mbarrier.arrive(empty.index(place), count=1)
                place, parity = next_place(place, parity, PLACES)
                result = _rounded(last, addend, dtype, HAS_UP_BIAS)
            _store(result, outs, which, n + h * SIDE, f, staging, MAPS)
    tma.store_wait(0)


@gluon.jit
def projection_hopper_kernel(
    x,
    down_a0, down_a1, down_a2, down_bias_a, up_a0, up_a1, up_a2, up_bias_a, out_a,
    down_b0, down_b1, down_b2, down_bias_b, up_b0, up_b1, up_b2, up_bias_b, out_b,
    down_c0, down_c1, down_c2, down_bias_c, up_c0, up_c1, up_c2, up_bias_c, out_c,
    tiles, depth, biased_rank_a, biased_width_a, width_a, biased_rank_b, biased_width_b, width_b,
    biased_rank_c, biased_width_c, width_c,
    R0: gl.constexpr, R1: gl.constexpr, R2: gl.constexpr, HEIGHT: gl.constexpr, MAPS: gl.constexpr,
    HAS_DOWN_BIAS: gl.constexpr, HAS_UP_BIAS: gl.constexpr, AHEAD: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """As :func:`~.projection.projection_kernel`, every ``num_programs``-th tile; all maps' ranks are cut alike.

    A tile is ``128 * HEIGHT`` rows of a map's result. Biases end at ``biased_rank`` and
    ``biased_width``, which are 0 where only other maps have one.
    """
    ring_x = gl.allocate_shared_memory(x.dtype, [PLACES * 2 * HEIGHT, SIDE, SIDE], x.layout)
    rings = (_places(x.dtype, R0, PLACES),)
    if R1 > 0:
        rings = rings + (_places(x.dtype, R1, PLACES),)
    if R2 > 0:
        rings = rings + (_places(x.dtype, R2, PLACES),)
    stagings = gl.allocate_shared_memory(out_a.dtype, [2, SIDE, SIDE], out_a.layout)
    full, empty = barriers(PLACES, 1), barriers(PLACES, 2)
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    downs = (down_a0, down_a1, down_a2), (down_b0, down_b1, down_b2), (down_c0, down_c1, down_c2)
    ups = (up_a0, up_a1, up_a2), (up_b0, up_b1, up_b2), (up_c0, up_c1, up_c2)
    down_biases, up_biases = (down_bias_a, down_bias_b, down_bias_c), (up_bias_a, up_bias_b, up_bias_c)
    outs = out_a, out_b, out_c
    biased_ranks = biased_rank_a, biased_rank_b, biased_rank_c
    biased_widths = biased_width_a, biased_width_b, biased_width_c
    widths = width_a, width_b, width_c
    gl.warp_specialize(
        [
            (_consume, (0, down_biases, up_biases, outs, ring_x, rings, full, empty, stagings, first, programs, tiles,
                        depth, biased_ranks, biased_widths, widths, R0, R1, R2, HEIGHT, MAPS, HAS_DOWN_BIAS,
                        HAS_UP_BIAS, AHEAD, PLACES)),
            (_consume, (1, down_biases, up_biases, outs, ring_x, rings, full, empty, stagings, first, programs, tiles,
                        depth, biased_ranks, biased_widths, widths, R0, R1, R2, HEIGHT, MAPS, HAS_DOWN_BIAS,
                        HAS_UP_BIAS, AHEAD, PLACES)),
            (_produce, (x, downs, ups, ring_x, rings, full, empty, first, programs, tiles, depth, widths, R0, R1, R2,
                        HEIGHT, MAPS, PLACES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def project_hopper(x: Tensor, *maps: Map, ahead: bool = False) -> None:
    """Fill each map's ``out`` with its projection of ``x[rows, in_features]``, half precision.

    Matrices have contiguous rows of 16-byte aligned addresses, biases are contiguous. Ranks may be up to 256; a smaller
    one costs as much as the largest.

    Args:
        x: ``[rows, in_features]``.
        maps: one to three; the ``out`` of one alone may be the memory of ``x``.
        ahead: as in :func:`~.projection.project`, of matrices that it did not have to copy.
    """
    rows, depth = x.shape
    processors = target_of(x.device).processors
    cut = pieces(max(m.down.shape[0] for m in maps))
    height = _height(rows, len(maps), sum(cut), processors)
    block = 2 * height * _SIDE
    tiles = triton.cdiv(rows, block) * len(maps)
    three = (*maps, *[maps[-1]] * (3 - len(maps)))
    place_bytes = 2 * _SIDE * (block + sum(cut))
    staging_bytes = 2 * 2 * _SIDE * _SIDE
    launch(
        projection_hopper_kernel,
        (min(tiles, processors), 1),
        tiles_of(x, [_SIDE, _SIDE]),
        *(argument for m in three for argument in _operands(m, cut)),
        tiles,
        depth,
        *(size for m in three for size in _sizes(m)),
        *cut,
        HEIGHT=height,
        MAPS=len(maps),
        HAS_DOWN_BIAS=any(m.down_bias is not None for m in maps),
        HAS_UP_BIAS=any(m.up_bias is not None for m in maps),
        AHEAD=ahead,
        PLACES=min(8, (SHARED_MEMORY - staging_bytes) // place_bytes),
        num_warps=4,
        maxnreg=168,
        overlapping=ahead,
    )


def _height(rows: int, maps: int, width: int, processors: int) -> int:
    """Tiles of 64 rows that a warpgroup takes at once: two where the chip is not busy for longer then."""

    def rounds(height: int) -> int:
        return triton.cdiv(triton.cdiv(rows, 2 * height * _SIDE) * maps, processors) * height

    return 2 if width <= _WIDE[maps] and rounds(2) <= rounds(1) else 1


def _operands(m: Map, cut: tuple[int, int, int]) -> list:
    """The kernel's arguments for one map's tensors; the factors themselves stand for absent pieces of them."""
    return [
        *(tiles_of(m.down, [piece, _SIDE]) if piece else m.down for piece in cut),
        m.down if m.down_bias is None else m.down_bias,
        *(tiles_of(m.up, [_SIDE, piece]) if piece else m.up for piece in cut),
        m.up if m.up_bias is None else m.up_bias,
        tiles_of(m.out, [_SIDE, _SIDE]),
    ]


def _sizes(m: Map) -> tuple[int, int, int]:
    """Where a map's biases end, and how many columns it has."""
    (width, rank) = m.up.shape
    return 0 if m.down_bias is None else rank, 0 if m.up_bias is None else width, width
