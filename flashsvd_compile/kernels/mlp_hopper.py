"""The fused core of a low-rank MLP on Hopper, in Gluon: :mod:`.mlp` with its warps specialised.

    latent_out[n, :] = act(latent[n, :] @ up.T + bias) @ down.T

One warp streams 64x64 tiles of both factors through a ring in shared memory. Two warpgroups of 64 rows each consume
them, and nothing makes them go in step: while one activates its hidden tile, the other has the matrix units.
"""

# ruff: noqa: RUF005 - Gluon has no starred expressions
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .activations import activate
from .dialect import async_load, wait_for_threads
from .launch import launch
from .ring import SHARED_MEMORY, barriers, next_place, tiles_of

_SIDE = 64
"""Rows and columns of a tile: 128 bytes a row, which is what the memory's swizzle spans."""
_TILE_BYTES = 2 * _SIDE * _SIDE
SIDE = gl.constexpr(_SIDE)
TILE_BYTES = gl.constexpr(_TILE_BYTES)


@gluon.jit
def _produce(latent, up, down, tiles, ring, full, empty, ready, n, f_first, f_start, f_stop, steps,
             IN: gl.constexpr, OUT: gl.constexpr, PLACES: gl.constexpr):  # fmt: skip
    group: gl.constexpr = max(IN, OUT)
    mbarrier.expect(ready, 2 * IN * TILE_BYTES)
    for i in gl.static_range(2 * IN):
        async_load(latent, [n + i // IN * SIDE, i % IN * SIDE], ready, tiles.index(i))
    place = 0
    parity = 0
    f = f_first
    for _ in range(steps):
        mbarrier.wait(empty.index(place), parity ^ 1)
        mbarrier.expect(full.index(place), IN * TILE_BYTES)
        for i in gl.static_range(IN):
            async_load(up, [f, i * SIDE], full.index(place), ring.index(place * group + i))
        place, parity = next_place(place, parity, PLACES)
        mbarrier.wait(empty.index(place), parity ^ 1)
        mbarrier.expect(full.index(place), OUT * TILE_BYTES)
        for i in gl.static_range(OUT):
            async_load(down, [i * SIDE, f], full.index(place), ring.index(place * group + i))
        place, parity = next_place(place, parity, PLACES)
        f = gl.where(f + SIDE < f_stop, f + SIDE, f_start)


@gluon.jit
def _consume(INDEX: gl.constexpr, out, bias, tiles, ring, full, empty, ready, n, f_first, f_start, f_stop, steps,
             rows, width, rank_out, stride_out, IN: gl.constexpr, OUT: gl.constexpr, PLACES: gl.constexpr,
             HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr):  # fmt: skip
    group: gl.constexpr = max(IN, OUT)
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    dtype: gl.constexpr = ring.dtype
    columns = gl.arange(0, SIDE, layout=gl.SliceLayout(0, layout))
    sums = (gl.zeros([SIDE, SIDE], gl.float32, layout=layout),)
    for _ in gl.static_range(OUT - 1):
        sums = sums + (gl.zeros([SIDE, SIDE], gl.float32, layout=layout),)
    mbarrier.wait(ready, 0)
    place = 0
    parity = 0
    f = f_first
    for _ in range(steps):
        if HAS_BIAS:
            addend = gl.load(bias + (f + columns), mask=f + columns < width, other=0.0)
        hidden = warpgroup_mma_init(gl.zeros([SIDE, SIDE], gl.float32, layout=layout))
        mbarrier.wait(full.index(place), parity)
        zero = f >> 30  # unknown to the compiler, which else keeps the addresses of all latent tiles in registers
        for i in gl.static_range(IN):
            up_tile = ring.index(place * group + i).permute((1, 0))
            hidden = warpgroup_mma(tiles.index(INDEX * IN + i + zero), up_tile, hidden, use_acc=i > 0, is_async=True)
        lifted = warpgroup_mma_wait(0, deps=(hidden,))
        wait_for_threads()  # all four warps are through with what they read
        mbarrier.arrive(empty.index(place), count=1)
        place, parity = next_place(place, parity, PLACES)
        if HAS_BIAS:
            lifted = lifted + addend.to(gl.float32)[None, :]
        active = gl.convert_layout(activate(lifted, ACTIVATION, True, True).to(dtype), operand)
        mbarrier.wait(full.index(place), parity)
        products = ()
        for i in gl.static_range(OUT):
            down_tile = ring.index(place * group + i).permute((1, 0))
            products = products + (warpgroup_mma(active, down_tile, sums[i], is_async=True),)
        waited = warpgroup_mma_wait(0, deps=(active,) + products)
        sums = waited[1:]
        wait_for_threads()
        mbarrier.arrive(empty.index(place), count=1)
        place, parity = next_place(place, parity, PLACES)
        f = gl.where(f + SIDE < f_stop, f + SIDE, f_start)
    r = n + INDEX * SIDE + gl.arange(0, SIDE, layout=gl.SliceLayout(1, layout))
    for i in gl.static_range(OUT):
        c = i * SIDE + columns
        pointers = out + r[:, None].to(gl.int64) * stride_out + c[None, :]
        gl.store(pointers, sums[i].to(dtype), mask=(r[:, None] < rows) & (c[None, :] < rank_out))


@gluon.jit
def mlp_hopper_kernel(
    latent, up, bias, down, out, rows, width, width_per_split, rank_out, stride_out,
    IN: gl.constexpr, OUT: gl.constexpr, PLACES: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """As :func:`~.mlp.mlp_core_kernel`, 128 rows a program; ``IN`` and ``OUT`` are the ranks in tiles."""
    n = gl.program_id(0) * 2 * SIDE
    split = gl.program_id(1)
    out += split.to(gl.int64) * rows * stride_out
    f_start = split * width_per_split
    f_stop = gl.minimum(f_start + width_per_split, width)
    steps = gl.cdiv(f_stop - f_start, SIDE)
    # Programs start at different columns: in step they would all wait for the same weights from device memory.
    f_first = f_start + gl.program_id(0) % steps * SIDE

    tiles = gl.allocate_shared_memory(latent.dtype, [2 * IN, SIDE, SIDE], latent.layout)
    ring = gl.allocate_shared_memory(up.dtype, [PLACES * max(IN, OUT), SIDE, SIDE], up.layout)
    full, empty = barriers(PLACES, 1), barriers(PLACES, 2)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    gl.warp_specialize(
        [
            (_consume, (0, out, bias, tiles, ring, full, empty, ready, n, f_first, f_start, f_stop, steps, rows, width,
                        rank_out, stride_out, IN, OUT, PLACES, HAS_BIAS, ACTIVATION)),
            (_consume, (1, out, bias, tiles, ring, full, empty, ready, n, f_first, f_start, f_stop, steps, rows, width,
                        rank_out, stride_out, IN, OUT, PLACES, HAS_BIAS, ACTIVATION)),
            (_produce, (latent, up, down, tiles, ring, full, empty, ready, n, f_first, f_start, f_stop, steps,
                        IN, OUT, PLACES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def mlp_core_hopper(
    latent: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, activation: str, out: Tensor, width_per_split: int
) -> None:
    """Fill ``out[splits * rows, rank_out]`` with the partial sums of ``act(latent @ up.T + bias) @ down.T``.

    Where it is faster than :mod:`.mlp`'s, that calls it (``benchmarks/NOTES.md``, "In Gluon"). A rank may be up to 320:
    above it a thread has no registers left for its sums.

    Args:
        latent: ``[rows, rank_in]``, half precision; matrices have contiguous rows of 16-byte aligned addresses.
        up: ``[width, rank_in]``.
        bias: ``[width]`` or ``None``.
        down: ``[rank_out, width]``.
        activation: a name of ``ops.activation.ACTIVATIONS``.
        out: in the dtype of ``latent``.
        width_per_split: columns of the hidden layer in each partial sum, a multiple of 64.
    """
    (rows, rank_in), (rank_out, width) = latent.shape, down.shape
    inner, outer = triton.cdiv(rank_in, _SIDE), triton.cdiv(rank_out, _SIDE)
    places = min(8, (SHARED_MEMORY // _TILE_BYTES - 2 * inner) // max(inner, outer))
    views = [tiles_of(matrix, [_SIDE, _SIDE]) for matrix in (latent, up, down)]
    launch(
        mlp_hopper_kernel,
        (triton.cdiv(rows, 2 * _SIDE), triton.cdiv(width, width_per_split)),
        *views[:2],
        latent if bias is None else bias.contiguous(),
        views[2],
        out,
        rows,
        width,
        width_per_split,
        rank_out,
        out.stride(0),
        IN=inner,
        OUT=outer,
        PLACES=places,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        num_warps=4,
        maxnreg=168,
    )
