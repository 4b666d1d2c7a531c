"""Up to three products in one launch, each too small to fill a chip: of factors with each other, or with few rows.

The library takes a launch for each, 3.5 to 5 us (768 x 768 of depth 384 to 576, 4096 x 192 of depth 768, H200), and
four times as long at a depth that is no multiple of 8.
"""

from math import gcd
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, take_turn
from .target import occupies, target_of
from .tiles import load_tile, store_tile

MOST = 3
"""Products in a launch: those of a region's queries, keys and values."""


class Small(NamedTuple):
    """``out = x @ weight.T + bias``; or the bias is not added but copied, as one of rows.

    Attributes:
        x: ``[rows, depth]``.
        weight: ``[columns, depth]``.
        bias: ``[columns]``, with ``copy`` ``[rows]``; or ``None``.
        out: ``[rows, columns]``, contiguous rows.
        copy: ``[rows]``, contiguous, to take the bias; or ``None``.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    out: Tensor
    copy: Tensor | None = None


class Tile(NamedTuple):
    """Launch configuration: rows and columns of a result, depth of a step, warps, pipeline depth."""

    block_n: int
    block_f: int
    depth: int
    num_warps: int
    num_stages: int


TILES = Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3)
"""The second where the first leaves half of the chip idle."""


SHALLOW = 1024
"""Depth up to which one launch of one round of the chip is faster than the library: 0.58 to 0.98 of its time at 768 and
1024. At 2048 and 4096 it is 0.74 to 1.5, of two rounds 1.1 to 1.3 (H200; 256 to 4096 rows, 128 to 1024 columns)."""


def faster(*operands: tuple[Tensor, Tensor]) -> bool:
    """Whether one launch is faster than the library for the products of these ``(x, weight)``."""
    if not supported(*operands):
        return False
    x = operands[0][0]
    one_round = _count(TILES[0], *operands) <= target_of(x.device).processors
    return one_round and all(x.shape[1] <= SHALLOW for x, _ in operands)


def supported(*operands: tuple[Tensor, Tensor]) -> bool:
    """Whether one launch takes the products of these ``(x, weight)``, and is faster than the library where they are of
    factors: in half precision, of layouts alike, results none of which fills the chip.
    """
    x, weight = operands[0]
    target = target_of(x.device)
    small = not any(occupies(target, _count(TILES[0], each)) for each in operands)
    alike = all(_layout(*each) == _layout(x, weight) for each in operands) and None not in _layout(x, weight)
    wide = all(min(*x.shape, *weight.shape) > 1 for x, weight in operands)  # Triton makes constants of ones
    return small and alike and wide and len(operands) <= MOST and x.element_size() == 2


def _count(tile: Tile, *operands: tuple[Tensor, Tensor]) -> int:
    """Tiles of all results."""
    return sum(triton.cdiv(len(x), tile.block_n) * triton.cdiv(len(weight), tile.block_f) for x, weight in operands)


def _layout(x: Tensor, weight: Tensor) -> tuple[int | None, int | None]:
    """The dimension along which elements of each operand are adjacent."""
    return _adjacent(x), _adjacent(weight)


def _adjacent(matrix: Tensor) -> int | None:
    """``None`` where neither is, or rows overlap."""
    return next((dim for dim in (1, 0) if matrix.stride(dim) == 1 < matrix.stride(1 - dim)), None)


@triton.jit
def _of(a, b, c, index, tiles_a, tiles_b):
    """What belongs to the product that this is a tile of."""
    return tl.where(index < tiles_a, a, tl.where(index < tiles_a + tiles_b, b, c))


@triton.jit
def small_products_kernel(
    x_a, weight_a, bias_a, out_a, copy_a, rows_a, columns_a, depth_a, biases_a, stride_x_a, stride_weight_a,
    stride_out_a, tiles_a,
    x_b, weight_b, bias_b, out_b, copy_b, rows_b, columns_b, depth_b, biases_b, stride_x_b, stride_weight_b,
    stride_out_b, tiles_b,
    x_c, weight_c, bias_c, out_c, copy_c, rows_c, columns_c, depth_c, biases_c, stride_x_c, stride_weight_c,
    stride_out_c,
    BY_DEPTH: tl.constexpr, WEIGHT_BY_DEPTH: tl.constexpr, ALIGNMENT: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of one of three results; ``biases`` is a bias's size, 0 where there is none."""
    index = tl.program_id(0)
    x = _of(x_a, x_b, x_c, index, tiles_a, tiles_b)
    weight = _of(weight_a, weight_b, weight_c, index, tiles_a, tiles_b)
    bias = _of(bias_a, bias_b, bias_c, index, tiles_a, tiles_b)
    out = _of(out_a, out_b, out_c, index, tiles_a, tiles_b)
    copy = _of(copy_a, copy_b, copy_c, index, tiles_a, tiles_b)
    rows = _of(rows_a, rows_b, rows_c, index, tiles_a, tiles_b)
    biases = _of(biases_a, biases_b, biases_c, index, tiles_a, tiles_b)
    stride_out = _of(stride_out_a, stride_out_b, stride_out_c, index, tiles_a, tiles_b)
    # Triton itself looks for multiples of 16 only, and of a depth of 600 would load each element by itself.
    columns = _of(columns_a, columns_b, columns_c, index, tiles_a, tiles_b) // ALIGNMENT * ALIGNMENT
    depth = _of(depth_a, depth_b, depth_c, index, tiles_a, tiles_b) // ALIGNMENT * ALIGNMENT
    stride_x = _of(stride_x_a, stride_x_b, stride_x_c, index, tiles_a, tiles_b) // ALIGNMENT * ALIGNMENT
    stride_weight = _of(stride_weight_a, stride_weight_b, stride_weight_c, index, tiles_a, tiles_b)
    stride_weight = stride_weight // ALIGNMENT * ALIGNMENT

    index -= _of(0, tiles_a, tiles_a + tiles_b, index, tiles_a, tiles_b)
    row = index // tl.cdiv(columns, BLOCK_F) * BLOCK_N
    column = index % tl.cdiv(columns, BLOCK_F) * BLOCK_F
    result = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    take_turn()
    for k in tl.range(0, depth, DEPTH, num_stages=STAGES):
        if BY_DEPTH:
            left = load_tile(x, row, k, rows, depth, stride_x, 1, BLOCK_N, DEPTH, False)
        else:
            left = load_tile(x, row, k, rows, depth, 1, stride_x, BLOCK_N, DEPTH, False)
        if WEIGHT_BY_DEPTH:
            right = load_tile(weight, column, k, columns, depth, stride_weight, 1, BLOCK_F, DEPTH, False)
        else:
            right = load_tile(weight, column, k, columns, depth, 1, stride_weight, BLOCK_F, DEPTH, False)
        result = tl.dot(left, right.T, result)
    if BIAS == "added":
        c = column + tl.arange(0, BLOCK_F)
        result += tl.load(bias + c, mask=c < biases, other=0.0).to(tl.float32)[None, :]
    store_tile(out, result, row, column, rows, columns, stride_out, BLOCK_N, BLOCK_F)
    if BIAS == "copied" and column == 0:
        r = row + tl.arange(0, BLOCK_N)
        tl.store(copy + r, tl.load(bias + r, mask=r < biases), mask=r < biases)


def multiply_together(*products: Small, tile: Tile | None = None) -> None:
    """Fill all results and copies.

    Args:
        products: whose operands are :func:`supported`; all copy their bias or none does.
        tile: overrides the table.
    """
    operands = [(product.x, product.weight) for product in products]
    half = target_of(operands[0][0].device).processors // 2
    tile = tile or next((each for each in TILES if _count(each, *operands) > half), TILES[-1])
    arguments: list = []
    for x, weight, bias, out, copy in (*products, *products[:1] * (MOST - len(products))):
        vectors = (out, out) if bias is None else (bias.contiguous(), out if copy is None else copy)
        sizes = *out.shape, x.shape[1], 0 if bias is None else len(bias)
        strides = max(x.stride()), max(weight.stride()), out.stride(0)
        arguments += [x, weight, vectors[0], out, vectors[1], *sizes, *strides, _count(tile, (x, weight))]
    steps = [
        step for x, weight in operands for step in (x.shape[1], len(weight), max(x.stride()), max(weight.stride()))
    ]
    kinds = {"added" if product.copy is None else "copied" for product in products if product.bias is not None}
    by_depth = [dim == 1 for dim in _layout(*operands[0])]
    launch(
        small_products_kernel,
        (_count(tile, *operands), 1),
        *arguments[:-1],  # a tile that is none of the first two products' is the third's
        BY_DEPTH=by_depth[0],
        WEIGHT_BY_DEPTH=by_depth[1],
        ALIGNMENT=gcd(8, *steps),
        BIAS=next(iter(kinds), None),
        BLOCK_N=tile.block_n,
        BLOCK_F=tile.block_f,
        DEPTH=tile.depth,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        overlapping=True,
    )
