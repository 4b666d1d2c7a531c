"""Low-rank projections of the same rows in one launch, the rank-space intermediate kept on chip.

    out_j = (x @ down_j.T + down_bias_j) @ up_j.T + up_bias_j        for one or two j, or three (:func:`takes_three`)

A library needs two launches each, and chunks of a few thousand rows leave it starved: its second product is as deep as
the rank only. Here a program takes a block of rows through both products.
"""

from operator import is_
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autotune import about, tuned
from .launch import launch, take_turn
from .operands import begin_alike
from .target import Target, describable, occupies, precision_of, speaks_gluon, target_of
from .tiles import MAX_RANK, PIECE, load_tile, pieces, store_tile, tile_views, with_aligned_rows


class Tile(NamedTuple):
    """Launch configuration: rows, depth of a step of the first product, columns of a step of the second."""

    block_n: int
    block_d: int
    block_f: int
    num_warps: int
    num_stages: int


class Map(NamedTuple):
    """One projection with its destination.

    Attributes:
        down: ``[rank, in_features]``.
        down_bias: ``[rank]`` or ``None``.
        up: ``[out_features, rank]``.
        up_bias: ``[out_features]`` or ``None``.
        out: ``[rows, out_features]``, contiguous rows.
    """

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    out: Tensor


def tiles_of(target: Target, rank: int, itemsize: int, maps: int, rows: int = 0) -> list[Tile]:
    """The configurations that fit the chip's shared memory, the fastest measured one first.

    The compiler reuses the first product's buffers for the second one of the same projection, not of the other.
    """
    width = sum(pieces(rank))
    few = maps == 1 or triton.cdiv(rows, SHORT_BLOCK) * maps <= target.processors

    def fits(tile: Tile) -> bool:
        first = tile.num_stages * tile.block_d * (tile.block_n + width)
        second = tile.num_stages * tile.block_f * width
        return (max(first, second) + (maps - 1) * second) * itemsize + _RESERVE <= target.shared_memory

    return list(filter(fits, _candidates(target, width, itemsize, few)))


SHORT_BLOCK = 64
_RESERVE = 2048  # barriers


def _candidates(target: Target, width: int, itemsize: int, few: bool) -> list[Tile]:
    """Fastest first; none needs more registers than a thread has (``tests/kernels/test_cross_compilation.py``).

    ``few``: the short blocks all run at once, or two share a processor; else longer ones reread the weights less.
    """
    if itemsize == 4:
        return _float32_candidates(target, width)
    if target.name in ("sm_90", "sm_100"):
        if width > 320:
            return [Tile(SHORT_BLOCK, 64, 64, 8, 3), Tile(SHORT_BLOCK, 64, 64, 8, 2)]
        short, long = Tile(SHORT_BLOCK, 64, 64, 4, 3), Tile(128, 64, 64, 8, 3)
        shallow = [Tile(SHORT_BLOCK, 64, 64, 4, 2), Tile(128, 64, 64, 8, 2), Tile(128, 32, 32, 8, 2)]
        if target.name == "sm_100" and width > 192:
            # A long block's rank space goes through shared memory there.
            return [short, Tile(SHORT_BLOCK, 64, 64, 8, 2)]
        return [short, long, *shallow] if few else [long, short, *shallow]
    if width > 2 * PIECE:
        return []
    if target.name == "gfx942":
        pipelined = [Tile(64, 64, 64, 4, 2), Tile(64, 32, 32, 4, 2)]
        return [*(pipelined if width <= 192 else []), Tile(64, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1)]
    if width <= PIECE:
        return [Tile(64, 64, 64, 4, 2), Tile(64, 32, 32, 4, 2), Tile(32, 32, 32, 4, 1)]
    return [Tile(64, 32, 32, 8, 2), Tile(32, 32, 32, 4, 1)]


def _float32_candidates(target: Target, width: int) -> list[Tile]:
    """Tiles for float32, as in the MLP core."""
    if width > PIECE:
        return []
    if target.name == "gfx942" or width <= 32:
        return [Tile(32, 32, 32, 4, 1)]
    if target.descriptors and width > 64:
        return [Tile(16, 16, 16, 8, 1)]
    return [Tile(32, 32, 32, 8, 1)]


SPECIALISED_RANKS = range(1, 257)
"""Ranks of the kernel in Gluon: as many columns of rank space as fit in the registers of its threads."""
_SPECIALISED_ROWS = 128
"""Rows of its blocks."""


def is_specialised(target: Target, x: Tensor, maps: tuple[Map, ...]) -> bool:
    """Whether the kernel in Gluon takes these maps.

    Of one or two, its blocks of 128 rows must occupy the chip: it takes 16.6 us for two maps of 4096 rows where the
    short blocks of this one take 14.7, 21.5 for two of 8192 where this one takes 29.4 (H100). Three it takes alone.
    It writes results through descriptors, too, in pieces of 16 bytes: one across the last column would reach beyond.
    """
    if not speaks_gluon(target) or x.dtype.itemsize != 2 or max(m.down.shape[0] for m in maps) not in SPECIALISED_RANKS:
        return False
    busy = len(maps) == 3 or occupies(target, triton.cdiv(len(x), _SPECIALISED_ROWS) * len(maps))
    return busy and all(describable(m.out) and m.out.shape[1] % 8 == 0 for m in maps)


def takes_three(rows: int, ranks: list[int], widths: list[int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether three maps of so many rows should be taken at once: by processors that two of them would leave idle.

    That is, in no more rounds of the chip, and half of it at least. Only the kernel in Gluon takes three.
    """
    target = target_of(device)
    known = speaks_gluon(target) and dtype.itemsize == 2 and all(rank in SPECIALISED_RANKS for rank in ranks)
    if not known or any(width % 8 for width in widths):
        return False
    blocks, processors = triton.cdiv(rows, _SPECIALISED_ROWS), target.processors
    return 2 * 3 * blocks >= processors and triton.cdiv(3 * blocks, processors) == triton.cdiv(2 * blocks, processors)


@triton.jit
def _project(
    x, down_0, down_1, down_2, down_bias, up_0, up_1, up_2, up_bias, out, n, f_start, f_stop,
    rows, depth, rank, width, stride_x, stride_down_r, stride_down_d, stride_up_f, stride_up_r, stride_out,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows ``n .. n + BLOCK_N``, columns ``f_start .. f_stop`` of one projection."""
    dtype: tl.constexpr = out.dtype.element_ty
    acc0 = tl.zeros([BLOCK_N, R0], tl.float32)
    if R1 > 0:
        acc1 = tl.zeros([BLOCK_N, R1], tl.float32)
    if R2 > 0:
        acc2 = tl.zeros([BLOCK_N, R2], tl.float32)
    for d in tl.range(0, depth, BLOCK_D, num_stages=STAGES):
        tile = load_tile(x, n, d, rows, depth, stride_x, 1, BLOCK_N, BLOCK_D, DESCRIPTOR)
        w0 = load_tile(down_0, 0, d, rank, depth, stride_down_r, stride_down_d, R0, BLOCK_D, DESCRIPTOR)
        acc0 = tl.dot(tile, w0.T, acc0, input_precision=PRECISION)
        if R1 > 0:
            w1 = load_tile(down_1, R0, d, rank, depth, stride_down_r, stride_down_d, R1, BLOCK_D, DESCRIPTOR)
            acc1 = tl.dot(tile, w1.T, acc1, input_precision=PRECISION)
        if R2 > 0:
            w2 = load_tile(down_2, R0 + R1, d, rank, depth, stride_down_r, stride_down_d, R2, BLOCK_D, DESCRIPTOR)
            acc2 = tl.dot(tile, w2.T, acc2, input_precision=PRECISION)
    if HAS_DOWN_BIAS:
        c = tl.arange(0, R0)
        acc0 += tl.load(down_bias + c, mask=c < rank, other=0.0).to(tl.float32)[None, :]
        if R1 > 0:
            c = R0 + tl.arange(0, R1)
            acc1 += tl.load(down_bias + c, mask=c < rank, other=0.0).to(tl.float32)[None, :]
        if R2 > 0:
            c = R0 + R1 + tl.arange(0, R2)
            acc2 += tl.load(down_bias + c, mask=c < rank, other=0.0).to(tl.float32)[None, :]
    if AHEAD:
        take_turn()
    latent0 = acc0.to(dtype)
    if R1 > 0:
        latent1 = acc1.to(dtype)
    if R2 > 0:
        latent2 = acc2.to(dtype)

    columns = tl.arange(0, BLOCK_F)
    if HAS_UP_BIAS:
        bias_next = tl.load(up_bias + f_start + columns, mask=f_start + columns < width, other=0.0)
    for f in tl.range(f_start, f_stop, BLOCK_F, num_stages=STAGES):
        if HAS_UP_BIAS:
            # One step ahead, as in the MLP core: a load where it is used stalls the step.
            bias_here = bias_next
            bias_next = tl.load(up_bias + f + BLOCK_F + columns, mask=f + BLOCK_F + columns < width, other=0.0)
        u0 = load_tile(up_0, f, 0, width, rank, stride_up_f, stride_up_r, BLOCK_F, R0, DESCRIPTOR)
        result = tl.dot(latent0, u0.T, input_precision=PRECISION)
        if R1 > 0:
            u1 = load_tile(up_1, f, R0, width, rank, stride_up_f, stride_up_r, BLOCK_F, R1, DESCRIPTOR)
            result = tl.dot(latent1, u1.T, result, input_precision=PRECISION)
        if R2 > 0:
            u2 = load_tile(up_2, f, R0 + R1, width, rank, stride_up_f, stride_up_r, BLOCK_F, R2, DESCRIPTOR)
            result = tl.dot(latent2, u2.T, result, input_precision=PRECISION)
        if HAS_UP_BIAS:
            result += bias_here.to(tl.float32)[None, :]
        store_tile(out, result, n, f, rows, width, stride_out, BLOCK_N, BLOCK_F)


@triton.jit
def projection_kernel(
    x,
    down_a0, down_a1, down_a2, down_bias_a, up_a0, up_a1, up_a2, up_bias_a, out_a,
    down_b0, down_b1, down_b2, down_bias_b, up_b0, up_b1, up_b2, up_bias_b, out_b,
    rows, depth, stride_x, splits,
    rank_a, width_a, stride_down_ar, stride_down_ad, stride_up_af, stride_up_ar, stride_out_a,
    rank_b, width_b, stride_down_br, stride_down_bd, stride_up_bf, stride_up_br, stride_out_b,
    A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    MAPS: tl.constexpr, A_DOWN_BIAS: tl.constexpr, A_UP_BIAS: tl.constexpr, B_DOWN_BIAS: tl.constexpr,
    B_UP_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
    DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Block of rows ``program_id(0)``; ``program_id(1)`` picks the projection, then its share of the columns."""
    n = tl.program_id(0) * BLOCK_N
    which = tl.program_id(1) // splits
    split = tl.program_id(1) % splits
    if which == 0:
        share = tl.cdiv(tl.cdiv(width_a, BLOCK_F), splits) * BLOCK_F
        _project(
            x, down_a0, down_a1, down_a2, down_bias_a, up_a0, up_a1, up_a2, up_bias_a, out_a, n, split * share,
            tl.minimum((split + 1) * share, width_a), rows, depth, rank_a, width_a, stride_x, stride_down_ar,
            stride_down_ad, stride_up_af, stride_up_ar, stride_out_a, A0, A1, A2, BLOCK_N, BLOCK_D, BLOCK_F,
            A_DOWN_BIAS, A_UP_BIAS, DESCRIPTOR, PRECISION, AHEAD, STAGES,
        )  # fmt: skip
    elif MAPS > 1:
        share = tl.cdiv(tl.cdiv(width_b, BLOCK_F), splits) * BLOCK_F
        _project(
            x, down_b0, down_b1, down_b2, down_bias_b, up_b0, up_b1, up_b2, up_bias_b, out_b, n, split * share,
            tl.minimum((split + 1) * share, width_b), rows, depth, rank_b, width_b, stride_x, stride_down_br,
            stride_down_bd, stride_up_bf, stride_up_br, stride_out_b, B0, B1, B2, BLOCK_N, BLOCK_D, BLOCK_F,
            B_DOWN_BIAS, B_UP_BIAS, DESCRIPTOR, PRECISION, AHEAD, STAGES,
        )  # fmt: skip


def supported(ranks: list[int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a configuration for these ranks exists on this device."""
    if max(ranks) > MAX_RANK or min(ranks) < 1:
        return False
    return bool(tiles_of(target_of(device), max(ranks), dtype.itemsize, len(ranks)))


def project(x: Tensor, *maps: Map, ahead: bool = False) -> None:
    """Fill each map's ``out`` with its projection of ``x[rows, in_features]``.

    One map alone may write over ``x`` itself: a program reads its rows before it writes them.

    Args:
        x: ``[rows, in_features]``.
        maps: one or two, or three that :func:`takes_three` and whose ``out`` a descriptor can address.
        ahead: the launch before this one on the stream writes neither ``x`` nor a factor nor a bias: rank space is then
            computed while it still runs, and results are written when it is complete.
    """
    if not len(x):
        return
    target = target_of(x.device)
    in_place = any(begin_alike(m.out, x) for m in maps)
    given = (x, *maps)
    if target.descriptors:
        x = with_aligned_rows(x)
    elif x.stride(1) != 1:
        x = x.contiguous()
    maps = tuple(_readable(m, target) for m in maps)
    ahead = ahead and all(map(is_, (x, *maps), given))  # a copy is written by the launch before
    if is_specialised(target, x, maps):
        from .projection_hopper import project_hopper

        project_hopper(x, *maps, ahead=ahead)
        return
    assert len(maps) < 3, "ask takes_three() first"
    _launch(target, x, maps, in_place, _chosen_tile(target, x, maps, in_place), ahead)


def _readable(m: Map, target: Target) -> Map:
    """The map itself, or one with copies of the factors and biases that the kernels could not read as they are."""
    down_bias, up_bias = (None if bias is None else bias.contiguous() for bias in (m.down_bias, m.up_bias))
    read = m._replace(down_bias=down_bias, up_bias=up_bias)
    if target.descriptors:
        read = read._replace(down=with_aligned_rows(m.down), up=with_aligned_rows(m.up))
    return m if all(map(is_, read, m)) else read


def _chosen_tile(target: Target, x: Tensor, maps: tuple[Map, ...], in_place: bool) -> Tile:
    rows, depth = x.shape
    tiles = tiles_of(target, max(m.down.shape[0] for m in maps), x.element_size(), len(maps), rows)
    assert tiles, "ask supported() first"

    def run(tile: Tile) -> list[Tensor]:
        elsewhere = tuple(m._replace(out=torch.empty_like(m.out)) for m in maps)
        _launch(target, x, elsewhere, in_place, tile)
        return [m.out for m in elsewhere]

    each = {
        f"{name}_{index}": value
        for index, m in enumerate(maps)
        for name, value in {
            "rank": m.down.shape[0],
            "width": m.up.shape[0],
            "down_bias": m.down_bias is not None,
            "up_bias": m.up_bias is not None,
            "down_by_rows": m.down.stride(1) == 1,
            "up_by_rows": m.up.stride(1) == 1,
        }.items()
    }
    return tuned("projection", tiles, run, x, rows=about(rows), depth=depth, in_place=in_place, **each)


def _launch(target: Target, x: Tensor, maps: tuple[Map, ...], in_place: bool, tile: Tile, ahead: bool = False) -> None:
    """Where results replace their own rows of ``x``, one program has all of a row's columns."""
    rows, depth = x.shape
    blocks = triton.cdiv(rows, tile.block_n)
    splits = 1 if in_place else max(1, min(4, target.processors // (blocks * len(maps))))
    cuts = [pieces(m.down.shape[0]) for m in maps]
    pair = (maps[0], maps[-1])
    tensors = [part for m, cut in zip(pair, (cuts[0], cuts[-1]), strict=True) for part in _parts(m, cut, tile, target)]
    sizes = [size for m in pair for size in (*m.up.shape[::-1], *m.down.stride(), *m.up.stride(), m.out.stride(0))]
    biases = [bias is not None for m in pair for bias in (m.down_bias, m.up_bias)]
    launch(
        projection_kernel,
        (blocks, len(maps) * splits),
        *tile_views(x, [(tile.block_n, tile.block_d)], target.descriptors),
        *tensors,
        rows,
        depth,
        x.stride(0),
        splits,
        *sizes,
        *cuts[0],
        *cuts[-1],
        len(maps),
        *biases,
        BLOCK_N=tile.block_n,
        BLOCK_D=tile.block_d,
        BLOCK_F=tile.block_f,
        DESCRIPTOR=target.descriptors,
        PRECISION=precision_of(x.dtype),
        AHEAD=ahead,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        overlapping=ahead,
    )


def _parts(m: Map, cut: tuple[int, int, int], tile: Tile, target: Target) -> list:
    """The kernel's arguments for one map's tensors."""
    return [
        *tile_views(m.down, [(piece, tile.block_d) for piece in cut], target.descriptors),
        m.out if m.down_bias is None else m.down_bias,
        *tile_views(m.up, [(tile.block_f, piece) for piece in cut], target.descriptors),
        m.out if m.up_bias is None else m.up_bias,
        m.out,
    ]
