"""A product and what follows it on Hopper, in Gluon: an activation, then a gate or a residual.

    out = act(x @ weight.T + bias)        or        ... * gate        or        ... + residual

One warp streams tiles of both operands through a ring in shared memory, from one tile of the result to the next without
a break. Two warpgroups consume them, 64 rows by 256 columns each, and nothing makes them go in step. Each has a step's
products under way while it releases the step before, so that the matrix units never wait between steps. Bias,
activation and what is beside are applied to the float32 sums, which are rounded once.
"""

# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false
# Written for the Gluon of Triton 3.6.

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .activations import activate
from .launch import launch
from .operands import Product
from .ring import SHARED_MEMORY, barriers, next_place, tiles_of
from .target import target_of

_SIDE = 64
"""Rows of a warpgroup, depth of a step and columns that leave at once: 128 bytes, which the memory's swizzle spans."""
_COLUMNS = 256
"""Of a tile: the widest product there is, which reads the least of shared memory and of the L2."""
_PIECES = _COLUMNS // _SIDE
_GROUP = 16
"""Blocks of rows whose tiles come together: with them the tiles under way are nearly a square of the result."""
SIDE = gl.constexpr(_SIDE)
COLUMNS = gl.constexpr(_COLUMNS)
PIECES = gl.constexpr(_PIECES)
GROUP = gl.constexpr(_GROUP)


@gluon.jit
def _tile(index, row_blocks, column_blocks):
    """First row and column of a tile; tiles that are under way at one time share operands in the L2."""
    first_block = index // (GROUP * column_blocks) * GROUP
    beside = gl.minimum(GROUP, row_blocks - first_block)
    index -= first_block * column_blocks
    return (first_block + index % beside) * 2 * SIDE, index // beside * COLUMNS


@gluon.jit
def _produce(x, weight, memory, tiles, PLACES: gl.constexpr):
    """Load the operands of all tiles of this program."""
    ring_x, ring_weight, _, _, full, empty, _ = memory
    first, programs, row_blocks, column_blocks, _, depth = tiles
    place = 0
    parity = 0
    for index in range(first, row_blocks * column_blocks, programs):
        row, column = _tile(index, row_blocks, column_blocks)
        for d in range(0, depth, SIDE):
            mbarrier.wait(empty.index(place), parity ^ 1)
            barrier = full.index(place)
            mbarrier.expect(barrier, 2 * x.block_type.nbytes + weight.block_type.nbytes)
            for i in gl.static_range(2):
                tma.async_copy_global_to_shared(x, [row + i * SIDE, d], barrier, ring_x.index(2 * place + i))
            tma.async_copy_global_to_shared(weight, [column, d], barrier, ring_weight.index(place))
            place, parity = next_place(place, parity, PLACES)


@gluon.jit
def _halves(sums):
    """Left and right columns, by naming registers anew."""
    rows: gl.constexpr = sums.shape[0]
    columns: gl.constexpr = sums.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])
    left, right = sums.reshape([rows, 2, columns]).permute((0, 2, 1)).split()
    left = gl.convert_layout(left, layout, assert_trivial=True)
    right = gl.convert_layout(right, layout, assert_trivial=True)
    return left, right


@gluon.jit
def _consume(INDEX: gl.constexpr, bias, beside, out, memory, tiles, STAGED: gl.constexpr,
             PLACES: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr, BESIDE: gl.constexpr):  # fmt: skip
    """Multiply the ``INDEX``-th half of the rows of all tiles of this program.

    A tile of what is beside arrives while the products are under way, where the result leaves from. A gate that the
    result replaces is read and written by this warpgroup alone, and leaves before the next one is asked for.
    """
    ring_x, ring_weight, stagings, addends, full, empty, arrived = memory
    first, programs, row_blocks, column_blocks, columns, depth = tiles
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, SIDE, 16])
    by_thread: gl.constexpr = gl.BlockedLayout([COLUMNS // 128], [32], [4], [0])
    no_sums = gl.zeros([SIDE, COLUMNS], gl.float32, layout=wide)
    addend_memory = addends.index(INDEX)
    steps = gl.cdiv(depth, SIDE)
    place = 0
    parity = 0
    beside_parity = 0
    for index in range(first, row_blocks * column_blocks, programs):
        row, column = _tile(index, row_blocks, column_blocks)
        row += INDEX * SIDE
        if HAS_BIAS:
            # Once a tile and early, by whole lines: held as the sums need it, it would take 64 registers.
            c = column + gl.arange(0, COLUMNS, layout=by_thread)
            addend = gl.load(bias + c, mask=c < columns, other=0.0)
        mbarrier.wait(full.index(place), parity)
        weight_tile = ring_weight.index(place).permute((1, 0))
        sums = warpgroup_mma(ring_x.index(2 * place + INDEX), weight_tile, no_sums, use_acc=False, is_async=True)
        gl.thread_barrier()  # or the assembler moves the wait before the products
        tma.store_wait(0)  # the tile before has left
        gl.thread_barrier()
        if BESIDE is not None:
            barrier = arrived.index(INDEX)
            mbarrier.expect(barrier, PIECES * beside.block_type.nbytes)
            for i in gl.static_range(PIECES):
                staging = stagings.index(INDEX * STAGED + i)
                tma.async_copy_global_to_shared(beside, [row, column + i * SIDE], barrier, staging)
        for _ in range(steps - 1):
            after, after_parity = next_place(place, parity, PLACES)
            mbarrier.wait(full.index(after), after_parity)
            weight_tile = ring_weight.index(after).permute((1, 0))
            sums = warpgroup_mma(ring_x.index(2 * after + INDEX), weight_tile, sums, is_async=True)
            sums = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(sums,)))
            gl.thread_barrier()  # all four warps are through with what they read in the step before
            mbarrier.arrive(empty.index(place), count=1)
            place, parity = after, after_parity
        sums = warpgroup_mma_wait(0, deps=(sums,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(place), count=1)
        place, parity = next_place(place, parity, PLACES)

        if HAS_BIAS:
            addend_memory.store(addend)
            gl.thread_barrier()
        if BESIDE is not None:
            mbarrier.wait(arrived.index(INDEX), beside_parity)
            beside_parity ^= 1
        left, right = _halves(sums)
        pieces = _halves(left) + _halves(right)
        for i in gl.static_range(PIECES):
            # Without a branch the assembler activates all pieces before it stores one, and has no registers for that.
            if column + i * SIDE < columns:
                result = pieces[i]
                staging = stagings.index(INDEX * STAGED + i % STAGED)
                if HAS_BIAS:
                    here = addend_memory.slice(i * SIDE, SIDE).load(gl.SliceLayout(0, narrow))
                    result += here.to(gl.float32)[None, :]
                if ACTIVATION is not None:
                    result = activate(result, ACTIVATION, True, True)
                if BESIDE == "gate":
                    result *= staging.load(narrow).to(gl.float32)
                elif BESIDE == "residual":
                    result += staging.load(narrow).to(gl.float32)
                elif i >= STAGED:
                    tma.store_wait(STAGED - 1)
                    gl.thread_barrier()
                staging.store(result.to(out.dtype))
                fence_async_shared()
                gl.thread_barrier()
                tma.async_copy_shared_to_global(out, [row, column + i * SIDE], staging)
    tma.store_wait(0)


@gluon.jit
def product_hopper_kernel(
    x, weight, bias, beside, out, row_blocks, column_blocks, columns, depth,
    STAGED: gl.constexpr, PLACES: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """Every ``num_programs``-th tile of 128 rows by 256 columns."""
    ring_x = gl.allocate_shared_memory(x.dtype, [2 * PLACES, SIDE, SIDE], x.layout)
    ring_weight = gl.allocate_shared_memory(weight.dtype, [PLACES, COLUMNS, SIDE], weight.layout)
    stagings = gl.allocate_shared_memory(out.dtype, [2 * STAGED, SIDE, SIDE], out.layout)
    addends = gl.allocate_shared_memory(x.dtype, [2, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty = barriers(PLACES, 1), barriers(PLACES, 2)
    arrived = barriers(2, 1)
    memory = ring_x, ring_weight, stagings, addends, full, empty, arrived
    tiles = gl.program_id(0), gl.num_programs(0), row_blocks, column_blocks, columns, depth
    gl.warp_specialize(
        [
            (_consume, (0, bias, beside, out, memory, tiles, STAGED, PLACES, HAS_BIAS, ACTIVATION, BESIDE)),
            (_consume, (1, bias, beside, out, memory, tiles, STAGED, PLACES, HAS_BIAS, ACTIVATION, BESIDE)),
            (_produce, (x, weight, memory, tiles, PLACES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def product_hopper(
    product: Product,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Fill the product's ``out`` as above.

    Args:
        product: of half precision; matrices have contiguous rows of 16-byte aligned addresses.
        activation: a name of ``ops.activation.ACTIVATIONS``; ``None`` is the identity.
        gate: like ``out``, may be ``out`` itself; multiplied with the activated product.
        residual: like ``out``, may be ``out`` itself; added. One of the two may be given.
    """
    x, weight, bias, out = product
    (rows, depth), columns = x.shape, weight.shape[0]
    row_blocks, column_blocks = triton.cdiv(rows, 2 * _SIDE), triton.cdiv(columns, _COLUMNS)
    tile_bytes = 2 * _SIDE * _SIDE
    beside = "gate" if gate is not None else "residual" if residual is not None else None
    staged = 2 if beside is None else _PIECES
    rest = SHARED_MEMORY - 2 * staged * tile_bytes - 2 * 2 * _COLUMNS
    results = tiles_of(out, [_SIDE, _SIDE])
    other = gate if gate is not None else residual
    launch(
        product_hopper_kernel,
        (min(row_blocks * column_blocks, target_of(x.device).processors), 1),
        tiles_of(x, [_SIDE, _SIDE]),
        tiles_of(weight, [_COLUMNS, _SIDE]),
        x if bias is None else bias.contiguous(),
        results if other is None else tiles_of(other, [_SIDE, _SIDE]),
        results,
        row_blocks,
        column_blocks,
        columns,
        depth,
        STAGED=staged,
        PLACES=rest // (2 * tile_bytes + 2 * _COLUMNS * _SIDE),
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        BESIDE=beside,
        num_warps=4,
        maxnreg=168,
    )
