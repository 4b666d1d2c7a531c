"""Products of several rows with whole weights on Hopper, in Gluon: :mod:`.gemv` with its warps specialised.

One warp streams tiles of 16 of a weight's rows through a ring in shared memory, from one block of features to the next
without a break, and waits for nothing but room: a launch that follows another one has its first tiles before that one
ends. Another warp streams the rows of ``x`` beside them as soon as they are there. Four warps multiply by the tensor
cores, each a part of the depth. A ring takes half of the shared memory at most: the next launch's needs room, too.

A root mean square norm is taken in passing: what a row is divided by is the same for all of its elements, so that the
sums are divided by it.

Rows at odd addresses are read as :mod:`.gemv` says: tiles begin at the 16-byte boundary before a row's first number, as
tensor descriptors want it, too, and what is beside the row is hidden.
"""

# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false

from collections.abc import Sequence

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .activations import activate
from .dialect import async_load, seen_as, wait_for_threads
from .gemv import MAX_ON_HOPPER, PERIOD, Fused, filled_up, has_odd_rows
from .launch import launch, take_turn
from .operands import Product
from .ring import SHARED_MEMORY, barriers, next_place, tiles_of
from .target import target_of

_SIDE = 64
"""Columns of a tile: 128 bytes, which the memory's swizzle spans."""
_FEATURES = 16
"""Rows of a weight that are taken together, as many as a product of the tensor cores has."""
_TILES = 8
"""Side by side in a place of the ring; each of four warps multiplies two of them."""
_PLACE_BYTES = 2 * _TILES * _SIDE * (_FEATURES + MAX_ON_HOPPER)
_PLACES = SHARED_MEMORY // 2 // _PLACE_BYTES
"""Places of a ring that leaves room on the processor for that of the next launch."""
SIDE = gl.constexpr(_SIDE)
FEATURES = gl.constexpr(_FEATURES)
TILES = gl.constexpr(_TILES)
ROWS = gl.constexpr(MAX_ON_HOPPER)
STEP = gl.constexpr(_TILES * _SIDE)
# What a descriptor writes for 64 columns, as three dimensions, the last two in either order.
BY_ROWS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0]))
BY_COLUMNS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 2, 0]))
BY_THREAD = gl.constexpr(gl.BlockedLayout([1, 1, 8], [1, 4, 8], [4, 1, 1], [2, 1, 0]))


@gluon.jit
def _of(which, values):
    """One of three values."""
    return gl.where(which == 0, values[0], gl.where(which == 1, values[1], values[2]))


@gluon.jit
def _block(index, part: gl.constexpr, blocks, GATED: gl.constexpr):
    """Product and block of features that the ``part``-th part of a program's work is: of a pair the same of both."""
    if GATED:
        return part, index
    first, second = blocks
    which = gl.where(index < first, 0, gl.where(index < first + second, 1, 2))
    return which, index - _of(which, (0, first, first + second))


@triton.constexpr_function
def _may_be(i, part, gated):
    """Whether the ``i``-th product may be what the ``part``-th part of a program's work is."""
    return not gated or i == part


@gluon.jit
def _lead(block, depth, PERIOD: gl.constexpr):
    """Numbers between the 16-byte boundary before the rows of a block and their first."""
    return block % PERIOD * depth % PERIOD


@gluon.jit
def _stream(matrices, OF_X: gl.constexpr, ring, full, empty, work, rows, PRODUCTS: gl.constexpr, GATED: gl.constexpr,
            PERIOD: gl.constexpr, AHEAD: gl.constexpr, PLACES: gl.constexpr):  # fmt: skip
    """Load the weights of all blocks of this program; or the rows that they are multiplied with, in line with them.

    ``work`` is the first block, the distance to the next, how many there are in all, how many the first two products
    have, and the products' depths.
    """
    first, programs, items, blocks, depths = work
    if not AHEAD:
        take_turn()
    place = 0
    parity = 0
    for index in range(first, items, programs):
        for part in gl.static_range(1 + GATED):
            which, block = _block(index, part, blocks, GATED)
            depth = _of(which, depths)
            lead = _lead(block, depth, PERIOD)
            if OF_X:
                row = lead * rows  # of the copy that is shifted by so much
                column = 0
            else:
                row = block // PERIOD * FEATURES
                column = block % PERIOD * depth - lead
            for k in range(0, lead + depth, STEP):
                mbarrier.wait(empty.index(place), parity ^ 1)
                barrier = full.index(place)
                mbarrier.expect(barrier, TILES * matrices[0].block_type.nbytes)
                for i in gl.static_range(PRODUCTS):
                    if _may_be(i, part, GATED) and (GATED or which == i):
                        for t in gl.static_range(TILES):
                            here = [row, column + k + t * SIDE]
                            async_load(matrices[i], here, barrier, ring.index(place * TILES + t))
                place, parity = next_place(place, parity, PLACES)


@gluon.jit
def _columns(k, axis: gl.constexpr, layout: gl.constexpr):
    """Columns of a place that begins at the ``k``-th, counted along ``axis`` of ``[TILES, ., .]`` and tile by tile."""
    if axis == 1:
        side = gl.arange(0, SIDE, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    else:
        side = gl.arange(0, SIDE, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    return k + gl.arange(0, TILES, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None] * SIDE + side


@gluon.jit
def _normed(x, squares, norm_weight, k, depth, WEIGHTED: gl.constexpr):
    """Sums of squares ``[TILES, ROWS]`` with those of a place added; its numbers times the norm's weight, in place and
    in the dtype of ``x``.
    """
    numbers = x.load(BY_THREAD).to(gl.float32)
    squares += gl.sum(numbers * numbers, 2)
    if WEIGHTED:
        column = _columns(k, 2, BY_THREAD)
        weight = gl.load(norm_weight + column, mask=column < depth, other=0.0).to(gl.float32)
        x.store((numbers * weight).to(x.dtype))
        fence_async_shared()  # what is loaded here next comes by the other proxy
        wait_for_threads()
    return squares


@gluon.jit
def _consume(biases, outs, norm_weight, norm_eps, residual, stride_residual, rows, features, strides, copies, memory,
             work, HAS_BIAS: gl.constexpr, NORM: gl.constexpr, RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr,
             PRODUCTS: gl.constexpr, GATED: gl.constexpr, PERIOD: gl.constexpr, COPIES: gl.constexpr,
             PLACES: gl.constexpr):  # fmt: skip
    """Multiply, and what follows; sums are ``[TILES, FEATURES, ROWS]`` until a block's depth is through."""
    ring_x, ring_weight, full_x, full_weight, empty_x, empty_weight = memory
    first, programs, items, blocks, depths = work
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], warps_per_cta=[4, 1, 1], instr_shape=[1, 16, 8])
    of_weight: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sums_layout, k_width=2)
    of_x: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=sums_layout, k_width=2)
    out_layout: gl.constexpr = gl.SliceLayout(0, sums_layout)
    dtype: gl.constexpr = ring_x.dtype
    weight_by_rows = seen_as(ring_weight, [PLACES, TILES, FEATURES, SIDE], BY_ROWS)
    x_by_rows = seen_as(ring_x, [PLACES, TILES, ROWS, SIDE], BY_ROWS)
    x_by_columns = seen_as(ring_x, [PLACES, TILES, SIDE, ROWS], BY_COLUMNS)
    b = gl.arange(0, ROWS, gl.SliceLayout(0, out_layout))[None, :]
    take_turn()
    place = 0
    parity = 0
    for index in range(first, items, programs):
        which, block = _block(index, 0, blocks, GATED)
        f = block // PERIOD * FEATURES + gl.arange(0, FEATURES, gl.SliceLayout(1, out_layout))
        f = block % PERIOD + PERIOD * f
        inside = (f < _of(which, features))[:, None] & (b < rows)
        if RESIDUAL:  # asked for early
            added = gl.load(residual + b * stride_residual + f[:, None], mask=inside, other=0.0)
        total = gl.zeros([FEATURES, ROWS], gl.float32, out_layout)
        for part in gl.static_range(1 + GATED):
            of_part, _ = _block(index, part, blocks, GATED)
            depth = _of(of_part, depths)
            lead = _lead(block, depth, PERIOD)
            end = lead + depth
            sums = gl.zeros([TILES, FEATURES, ROWS], gl.float32, sums_layout)
            squares = gl.zeros([TILES, ROWS], gl.float32, gl.SliceLayout(2, BY_THREAD))
            for k in range(0, end, STEP):
                mbarrier.wait(full_weight.index(place), parity)
                weight = weight_by_rows.index(place).load(of_weight)
                mbarrier.wait(full_x.index(place), parity)
                if NORM is not None:
                    squares = _normed(x_by_rows.index(place), squares, norm_weight, k, depth, NORM == "weighted")
                x = x_by_columns.index(place).load(of_x)
                if PERIOD > 1:  # noqa: SIM102 - known when compiled
                    if (k < lead) | (k + STEP > end):
                        column = _columns(k, 2, of_weight)
                        weight = gl.where((column >= lead) & (column < end), weight, gl.zeros_like(weight))
                        column = _columns(k, 1, of_x)
                        x = gl.where((column >= lead) & (column < end), x, gl.zeros_like(x))
                sums = mma_v2(weight, x, sums)
                wait_for_threads()  # all four warps have read the place
                mbarrier.arrive(empty_weight.index(place), count=1)
                mbarrier.arrive(empty_x.index(place), count=1)
                place, parity = next_place(place, parity, PLACES)
            result = gl.sum(sums, 0)
            if NORM is not None:
                mean = gl.sum(squares, 0) / depth
                result /= gl.sqrt(gl.convert_layout(mean, gl.SliceLayout(0, out_layout)) + norm_eps)[None, :]
            for i in gl.static_range(PRODUCTS):
                if HAS_BIAS[i] and _may_be(i, part, GATED):  # noqa: SIM102
                    if GATED or which == i:
                        here = gl.load(biases[i] + f[:, None], mask=(f < features[i])[:, None], other=0.0)
                        result += here.to(gl.float32)
            if part == 0:
                if ACTIVATION is not None:
                    result = activate(result, ACTIVATION, True, True)
                total = result
            else:
                total *= result
        if RESIDUAL:
            total += added.to(gl.float32)
        for i in gl.static_range(1 if GATED else PRODUCTS):
            if GATED or which == i:
                for copy in gl.static_range(COPIES):
                    here = outs[i] + copy * copies[i] + b * strides[i] + f[:, None]
                    gl.store(here, total.to(dtype), mask=inside)


@gluon.jit
def gemv_hopper_kernel(
    x_0, weight_0, bias_0, out_0, x_1, weight_1, bias_1, out_1, x_2, weight_2, bias_2, out_2,
    norm_weight, residual, norm_eps, stride_residual, rows, items, blocks_0, blocks_1,
    features_0, depth_0, stride_0, copy_0, features_1, depth_1, stride_1, copy_1, features_2, depth_2, stride_2, copy_2,
    PRODUCTS: gl.constexpr, BIAS_0: gl.constexpr, BIAS_1: gl.constexpr, BIAS_2: gl.constexpr, NORM: gl.constexpr,
    RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, PERIOD: gl.constexpr, COPIES: gl.constexpr,
    AHEAD: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """As :func:`~.gemv.gemv_kernel`. A program takes every ``num_programs``-th block of features."""
    ring_x = gl.allocate_shared_memory(x_0.dtype, [PLACES * TILES, ROWS, SIDE], x_0.layout)
    ring_weight = gl.allocate_shared_memory(weight_0.dtype, [PLACES * TILES, FEATURES, SIDE], weight_0.layout)
    full_x, empty_x = barriers(PLACES, 1), barriers(PLACES, 1)
    full_weight, empty_weight = barriers(PLACES, 1), barriers(PLACES, 1)
    memory = ring_x, ring_weight, full_x, full_weight, empty_x, empty_weight
    work = gl.program_id(0), gl.num_programs(0), items, (blocks_0, blocks_1), (depth_0, depth_1, depth_2)
    xs, weights = (x_0, x_1, x_2), (weight_0, weight_1, weight_2)
    biases, outs = (bias_0, bias_1, bias_2), (out_0, out_1, out_2)
    features = features_0, features_1, features_2
    strides, copies = (stride_0, stride_1, stride_2), (copy_0, copy_1, copy_2)
    has_bias: gl.constexpr = (BIAS_0, BIAS_1, BIAS_2)
    gl.warp_specialize(
        [
            (_consume, (biases, outs, norm_weight, norm_eps, residual, stride_residual, rows, features, strides, copies,
                        memory, work, has_bias, NORM, RESIDUAL, ACTIVATION, PRODUCTS, GATED, PERIOD, COPIES,
                        PLACES)),
            (_stream, (weights, False, ring_weight, full_weight, empty_weight, work, rows, PRODUCTS, GATED, PERIOD,
                       AHEAD, PLACES)),
            (_stream, (xs, True, ring_x, full_x, empty_x, work, rows, PRODUCTS, GATED, PERIOD, False, PLACES)),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip


def multiply_hopper(*products: Product, fused: Fused, follows: bool) -> None:
    """As :func:`~.gemv.multiply`, for products that :func:`~.gemv.takes_hopper` says yes to, of two to eight rows.

    Either a descriptor may read all matrices; or rows of weights are at odd addresses, contiguous and a multiple of
    ``PERIOD``, and ``x`` are shifted rows. A norm is taken only in the first case.
    """
    first = products[0]
    rows, processors = first.x.shape[-2], target_of(first.x.device).processors
    period = PERIOD if has_odd_rows([product.weight for product in products]) else 1
    blocks = [period * triton.cdiv(product.weight.shape[0] // period, _FEATURES) for product in products]
    items = blocks[0] if fused.gated else sum(blocks)
    programs, places = _grid(items, processors)
    three = filled_up(products)
    launch(
        gemv_hopper_kernel,
        (programs, 1),
        *(operand for product in three for operand in _operands(product, period)),
        *fused.arguments(absent=first.out),
        rows,
        items,
        blocks[0],
        blocks[min(1, len(blocks) - 1)],
        *(size for product in three for size in _sizes(product)),
        len(products),
        *(product.bias is not None for product in three),
        **fused.constants(),
        PERIOD=period,
        COPIES=first.out.shape[0] if first.out.dim() == 3 else 1,
        AHEAD=follows,
        PLACES=places,
        num_warps=4,
        maxnreg=128,
        overlapping=True,
    )


def _grid(items: int, processors: int) -> tuple[int, int]:
    """Programs, and places of each one's ring.

    Two programs share a processor and the places where there is work for both: one multiplies while the other adds up
    a block and writes it.
    """
    if items > processors:
        return min(items, 2 * processors), _PLACES // 2
    return items, _PLACES


def _operands(product: Product, period: int) -> Sequence:
    """The kernel's arguments for one product's tensors."""
    x, weight, bias, out = product
    if x.dim() == 3:  # the memory of all copies, row after row
        x = x.as_strided((x.shape[0] * x.shape[1], x.stride(1)), (x.stride(1), 1))
    if period > 1:
        weight = weight.view(weight.shape[0] // period, period * weight.shape[1])
    tiles = tiles_of(x, [MAX_ON_HOPPER, _SIDE]), tiles_of(weight, [_FEATURES, _SIDE])
    return *tiles, out if bias is None else bias, out


def _sizes(product: Product) -> tuple[int, int, int, int]:
    """The kernel's numbers for one product."""
    (features, depth), out = product.weight.shape, product.out
    return features, depth, out.stride(-2), out.stride(0) if out.dim() == 3 else 0
