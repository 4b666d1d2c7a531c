"""A product and what follows it on Hopper, in Gluon: an activation, then a gate, a residual or a rotation.

    out = act(x @ weight.T + bias)    or    ... * gate    or    ... + residual    or    rotated by position

A gate may be a product itself, which exists for one tile at a time.

One warp streams tiles of both operands through a ring in shared memory, from one tile of the result to the next without
a break. Two warpgroups consume them, 64 rows by 256 columns each, and nothing makes them go in step. Each has a step's
products under way while it releases the step before, so that the matrix units never wait between steps. Bias,
activation and what is beside are applied to the float32 sums, which are rounded once.
"""

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
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .activations import activate
from .dialect import async_load, async_store, wait_for_threads
from .launch import launch
from .operands import Product, Rotation
from .ring import SHARED_MEMORY, barriers, next_place, tiles_of
from .target import target_of

_SIDE = 64
"""Rows of a warpgroup, depth of a step and columns that leave at once: 128 bytes, which the memory's swizzle spans."""
_COLUMNS = 256
"""Columns of a tile: the widest product there is, which reads the least of shared memory and of the L2."""
_PIECES = _COLUMNS // _SIDE
_GROUP = 8
"""Blocks of rows whose tiles come together: with 16 operands are read less, but what is beside them 3 % slower."""
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
def _produce(products, memory, tiles, PLACES: gl.constexpr):
    """Load the operands of all tiles of this program, those of the products of one tile one after the other."""
    ring_x, ring_weight, _, _, full, empty, _ = memory
    first, programs, row_blocks, column_blocks, _ = tiles
    place = 0
    parity = 0
    for index in range(first, row_blocks * column_blocks, programs):
        row, column = _tile(index, row_blocks, column_blocks)
        for p in gl.static_range(len(products)):
            x, weight, depth = products[p]
            for d in range(0, depth, SIDE):
                mbarrier.wait(empty.index(place), parity ^ 1)
                barrier = full.index(place)
                mbarrier.expect(barrier, 2 * x.block_type.nbytes + weight.block_type.nbytes)
                for i in gl.static_range(2):
                    async_load(x, [row + i * SIDE, d], barrier, ring_x.index(2 * place + i))
                async_load(weight, [column, d], barrier, ring_weight.index(place))
                place, parity = next_place(place, parity, PLACES)


@gluon.jit
def _begin(INDEX: gl.constexpr, memory, place, parity):
    """Have the first step of a product under way."""
    ring_x, ring_weight, _, _, full, _, _ = memory
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    no_sums = gl.zeros([SIDE, COLUMNS], gl.float32, layout=wide)
    mbarrier.wait(full.index(place), parity)
    weight_tile = ring_weight.index(place).permute((1, 0))
    return warpgroup_mma(ring_x.index(2 * place + INDEX), weight_tile, no_sums, use_acc=False, is_async=True)


@gluon.jit
def _go_on(INDEX: gl.constexpr, sums, steps, memory, place, parity, PLACES: gl.constexpr):
    """Have so many further steps under way one after the other, each while the one before is released."""
    ring_x, ring_weight, _, _, full, empty, _ = memory
    for _ in range(steps):
        after, after_parity = next_place(place, parity, PLACES)
        mbarrier.wait(full.index(after), after_parity)
        weight_tile = ring_weight.index(after).permute((1, 0))
        sums = warpgroup_mma(ring_x.index(2 * after + INDEX), weight_tile, sums, is_async=True)
        sums = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(sums,)))
        wait_for_threads()  # all four warps are through with what they read in the step before
        mbarrier.arrive(empty.index(place), count=1)
        place, parity = after, after_parity
    return sums, place, parity


@gluon.jit
def _end(sums, memory, place, parity, PLACES: gl.constexpr):
    """Wait for the last step of a product."""
    empty = memory[5]
    sums = warpgroup_mma_wait(0, deps=(sums,))
    wait_for_threads()
    mbarrier.arrive(empty.index(place), count=1)
    place, parity = next_place(place, parity, PLACES)
    return sums, place, parity


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
def _quarters(sums):
    """The pieces of a tile's columns."""
    left, right = _halves(sums)
    return _halves(left) + _halves(right)


@gluon.jit
def _ask(piece, others, staging, arrived, row, column, BESIDE: gl.constexpr):
    """Have a piece of what is beside loaded: of cosines and sines each half of the features."""
    if BESIDE == "rotation":
        cos, sin, first_position, positions = others
        position = (first_position + row) % positions
        half = piece % (PIECES // 2) * SIDE
        if piece < PIECES // 2:
            async_load(cos, [position, half], arrived, staging)
        else:
            async_load(sin, [position, half], arrived, staging)
    else:
        async_load(others[0], [row, column + piece * SIDE], arrived, staging)


@gluon.jit
def _addend(bias, column, columns):
    """The bias of a tile's columns, by whole lines: held as the sums need it, it would take 64 registers."""
    c = column + gl.arange(0, COLUMNS, layout=gl.BlockedLayout([COLUMNS // 128], [32], [4], [0]))
    return gl.load(bias + c, mask=c < columns, other=0.0)


@gluon.jit
def _plus_bias(piece, PIECE: gl.constexpr, addends, HAS_BIAS: gl.constexpr):
    """The ``PIECE``-th piece of a tile's columns, its bias added."""
    if HAS_BIAS:
        here = addends.slice(PIECE * SIDE, SIDE).load(gl.SliceLayout(0, piece.type.layout))
        piece += here.to(gl.float32)[None, :]
    return piece


@gluon.jit
def _rotated(x1, x2, stagings, FIRST: gl.constexpr):
    """A head's halves, turned; from the ``FIRST``-th piece on those of its cosines and of its sines."""
    layout: gl.constexpr = x1.type.layout
    turned = x1 * stagings.index(FIRST).load(layout).to(gl.float32)
    turned -= x2 * stagings.index(FIRST + 2).load(layout).to(gl.float32)
    x2 *= stagings.index(FIRST + 1).load(layout).to(gl.float32)
    x2 += x1 * stagings.index(FIRST + 3).load(layout).to(gl.float32)
    return turned, x2


@gluon.jit
def _wait_until_left():
    """Wait until the tile before has left the shared memory; called with products under way."""
    wait_for_threads()  # or the assembler moves the wait before the products
    tma.store_wait(0)
    wait_for_threads()


@gluon.jit
def _gate(INDEX: gl.constexpr, bias, gate, memory, place, parity, column, columns, PLACES: gl.constexpr,
          HAS_BIAS: gl.constexpr):  # fmt: skip
    """Multiply a tile of the gate, and leave it where the result is going to leave from."""
    stagings, addends = memory[2], memory[3].index(INDEX)
    if HAS_BIAS:
        addend = _addend(bias, column, columns)
    sums = _begin(INDEX, memory, place, parity)
    _wait_until_left()
    sums, place, parity = _go_on(INDEX, sums, gl.cdiv(gate[2], SIDE) - 1, memory, place, parity, PLACES)
    sums, place, parity = _end(sums, memory, place, parity, PLACES)
    if HAS_BIAS:
        addends.store(addend)
        wait_for_threads()
    pieces = _quarters(sums)
    for i in gl.static_range(PIECES):
        piece = _plus_bias(pieces[i], i, addends, HAS_BIAS)
        stagings.index(INDEX * PIECES + i).store(piece.to(stagings.dtype))
    return place, parity


@gluon.jit
def _consume(INDEX: gl.constexpr, bias, gate_bias, others, out, products, memory, tiles, STAGED: gl.constexpr,
             PLACES: gl.constexpr, HAS_BIAS: gl.constexpr, GATE_HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr,
             BESIDE: gl.constexpr):  # fmt: skip
    """Multiply the ``INDEX``-th half of the rows of all tiles of this program.

    A tile of what is beside arrives while the products are under way, where the result leaves from: piece by piece, as
    all of it at once would hold up the operands. A gate that the result replaces is read and written by this warpgroup
    alone, and leaves before the next one is asked for. A gate that is a product is multiplied first and waits there.
    """
    _, _, stagings, addends, _, _, arrived = memory
    first, programs, row_blocks, column_blocks, columns = tiles
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, SIDE, 16])
    addend_memory = addends.index(INDEX)
    ARRIVES: gl.constexpr = BESIDE is not None and BESIDE != "product"
    PARTS: gl.constexpr = PIECES if ARRIVES else 1
    further = gl.cdiv(products[len(products) - 1][2], SIDE) - 1
    place = 0
    parity = 0
    beside_parity = 0
    for index in range(first, row_blocks * column_blocks, programs):
        row, column = _tile(index, row_blocks, column_blocks)
        row += INDEX * SIDE
        if BESIDE == "product":
            place, parity = _gate(INDEX, gate_bias, products[0], memory, place, parity, column, columns, PLACES,
                                  GATE_HAS_BIAS)  # fmt: skip
        if HAS_BIAS:
            addend = _addend(bias, column, columns)
        sums = _begin(INDEX, memory, place, parity)
        if BESIDE != "product":
            _wait_until_left()
        if ARRIVES:
            mbarrier.expect(arrived.index(INDEX), PIECES * out.block_type.nbytes)
        for part in range(PARTS):
            if ARRIVES:
                staging = stagings.index(INDEX * STAGED + part)
                _ask(part, others, staging, arrived.index(INDEX), row, column, BESIDE)
            steps = further * (part + 1) // PARTS - further * part // PARTS
            sums, place, parity = _go_on(INDEX, sums, steps, memory, place, parity, PLACES)
        sums, place, parity = _end(sums, memory, place, parity, PLACES)

        if HAS_BIAS:
            addend_memory.store(addend)
            wait_for_threads()
        if ARRIVES:
            mbarrier.wait(arrived.index(INDEX), beside_parity)
            beside_parity ^= 1
        pieces = _quarters(sums)
        if BESIDE == "rotation":
            x1, x2, x3, x4 = pieces
            x1, x2 = _plus_bias(x1, 0, addend_memory, HAS_BIAS), _plus_bias(x2, 1, addend_memory, HAS_BIAS)
            x3, x4 = _plus_bias(x3, 2, addend_memory, HAS_BIAS), _plus_bias(x4, 3, addend_memory, HAS_BIAS)
            # The first condition always holds. Without branches the assembler reads the tables of both heads before it
            # turns one, and has no registers for that.
            if column < columns:
                x1, x2 = _rotated(x1, x2, stagings, INDEX * STAGED)
            if column + 2 * SIDE < columns:
                x3, x4 = _rotated(x3, x4, stagings, INDEX * STAGED)
            pieces = x1, x2, x3, x4
            wait_for_threads()  # all four warps have read the tables
        for i in gl.static_range(PIECES):
            # Without a branch the assembler activates all pieces before it stores one, and has no registers for that.
            if column + i * SIDE < columns:
                result = pieces[i]
                staging = stagings.index(INDEX * STAGED + i % STAGED)
                if BESIDE != "rotation":
                    result = _plus_bias(result, i, addend_memory, HAS_BIAS)
                if ACTIVATION is not None:
                    result = activate(result, ACTIVATION, True, True)
                if BESIDE == "gate" or BESIDE == "product":
                    result *= staging.load(narrow).to(gl.float32)
                elif BESIDE == "residual":
                    result += staging.load(narrow).to(gl.float32)
                elif i >= STAGED:
                    tma.store_wait(STAGED - 1)
                    wait_for_threads()
                staging.store(result.to(out.dtype))
                fence_async_shared()
                wait_for_threads()
                async_store(out, [row, column + i * SIDE], staging)
    tma.store_wait(0)


@gluon.jit
def product_hopper_kernel(
    x, weight, bias, gate_x, gate_weight, gate_bias, beside, sines, out, row_blocks, column_blocks, columns, depth,
    gate_depth, first_position, positions, STAGED: gl.constexpr, PLACES: gl.constexpr, HAS_BIAS: gl.constexpr,
    GATE_HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """Every ``num_programs``-th tile of 128 rows by 256 columns; beside a rotation are its cosines."""
    ring_x = gl.allocate_shared_memory(x.dtype, [2 * PLACES, SIDE, SIDE], x.layout)
    ring_weight = gl.allocate_shared_memory(weight.dtype, [PLACES, COLUMNS, SIDE], weight.layout)
    stagings = gl.allocate_shared_memory(out.dtype, [2 * STAGED, SIDE, SIDE], out.layout)
    addends = gl.allocate_shared_memory(x.dtype, [2, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty = barriers(PLACES, 1), barriers(PLACES, 2)
    arrived = barriers(2, 1)
    memory = ring_x, ring_weight, stagings, addends, full, empty, arrived
    tiles = gl.program_id(0), gl.num_programs(0), row_blocks, column_blocks, columns
    others = (beside, sines, first_position, positions) if BESIDE == "rotation" else (beside,)
    last = (x, weight, depth)
    products = ((gate_x, gate_weight, gate_depth), last) if BESIDE == "product" else (last,)
    gl.warp_specialize(
        [
            (_consume, (0, bias, gate_bias, others, out, products, memory, tiles, STAGED, PLACES, HAS_BIAS,
                        GATE_HAS_BIAS, ACTIVATION, BESIDE)),
            (_consume, (1, bias, gate_bias, others, out, products, memory, tiles, STAGED, PLACES, HAS_BIAS,
                        GATE_HAS_BIAS, ACTIVATION, BESIDE)),
            (_produce, (products, memory, tiles, PLACES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def product_hopper(
    product: Product,
    activation: str | None = None,
    gate: Tensor | Product | None = None,
    residual: Tensor | None = None,
    rotation: Rotation | None = None,
) -> None:
    """Fill the product's ``out`` as above.

    Args:
        product: of half precision; matrices have contiguous rows of 16-byte aligned addresses. The result may have more
            columns than the weight has rows, within the same 64; those become zero.
        activation: a name of ``ops.activation.ACTIVATIONS``; ``None`` is the identity.
        gate: multiplied with the activated product: like ``out``, may be ``out`` itself; or a product with the same
            ``out``, rounded before.
        residual: like ``out``, may be ``out`` itself; added.
        rotation: of heads of 128 features, which ``out`` has whole ones of, in its dtype; each 64 rows are at
            consecutive positions. At most one of gate, residual and rotation is given.
    """
    x, weight, bias, out = product
    (rows, depth), columns = x.shape, weight.shape[0]
    row_blocks, column_blocks = triton.cdiv(rows, 2 * _SIDE), triton.cdiv(columns, _COLUMNS)
    tile_bytes = 2 * _SIDE * _SIDE
    cos, sin, first = rotation or (None, out, 0)
    other = gate if isinstance(gate, Product) else product
    kind, beside = _beside(gate, residual, cos)
    staged = 2 if kind is None else _PIECES
    rest = SHARED_MEMORY - 2 * staged * tile_bytes - 2 * 2 * _COLUMNS
    launch(
        product_hopper_kernel,
        (min(row_blocks * column_blocks, target_of(x.device).processors), 1),
        tiles_of(x, [_SIDE, _SIDE]),
        tiles_of(weight, [_COLUMNS, _SIDE]),
        x if bias is None else bias.contiguous(),
        tiles_of(other.x, [_SIDE, _SIDE]),
        tiles_of(other.weight, [_COLUMNS, _SIDE]),
        x if other.bias is None else other.bias.contiguous(),
        tiles_of(out if beside is None else beside, [_SIDE, _SIDE]),
        tiles_of(sin, [_SIDE, _SIDE]),
        tiles_of(out, [_SIDE, _SIDE]),
        row_blocks,
        column_blocks,
        columns,
        depth,
        other.x.shape[1],
        first,
        0 if cos is None else len(cos),
        STAGED=staged,
        PLACES=rest // (2 * tile_bytes + 2 * _COLUMNS * _SIDE),
        HAS_BIAS=bias is not None,
        GATE_HAS_BIAS=other.bias is not None,
        ACTIVATION=activation,
        BESIDE=kind,
        num_warps=4,
        maxnreg=168,
    )


def _beside(
    gate: Tensor | Product | None, residual: Tensor | None, cos: Tensor | None
) -> tuple[str | None, Tensor | None]:
    """What the kernel reads beside the product, by its name for it, and the tensor if it is one."""
    if isinstance(gate, Product):
        return "product", None
    tensors = {"gate": gate, "residual": residual, "rotation": cos}
    return next(((kind, tensor) for kind, tensor in tensors.items() if tensor is not None), (None, None))
