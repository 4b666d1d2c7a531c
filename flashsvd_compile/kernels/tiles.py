"""Matrices cut into tiles: ranks as sums of powers of two, tiles loaded by descriptor or by pointer."""

from functools import cache
from itertools import combinations_with_replacement
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .target import describable

PIECE_WIDTHS = (16, 32, 64, 128)  # tensor cores multiply at least 16 deep
PIECE = PIECE_WIDTHS[-1]
MAX_RANK = 3 * PIECE


class Tile(NamedTuple):
    """Launch configuration: rows and columns of a tile, warps, pipeline depth."""

    block_n: int
    block_f: int
    num_warps: int
    num_stages: int


@cache
def pieces(rank: int) -> tuple[int, int, int]:
    """Up to three power-of-two widths that cover a rank: 96 is 32 + 64, 192 is 64 + 128, 304 is 128 + 128 + 64.

    A piece more must save 16 columns. Of two, the shorter product goes first and hides behind the longer; of three the
    longer ones go first (both orders measured on sm_90).
    """
    covers = [
        widths
        for count in (1, 2, 3)
        for widths in combinations_with_replacement(PIECE_WIDTHS, count)
        if sum(widths) >= rank
    ]
    best = min(covers, key=lambda widths: sum(widths) + 16 * len(widths))
    ordered = best if len(best) < 3 else best[::-1]
    first, second, third = (*ordered, 0, 0)[:3]
    return first, second, third


@triton.jit
def load_tile(source, row, column, rows, columns, stride_row, stride_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
          DESCRIPTOR: tl.constexpr):  # fmt: skip
    """``[ROWS, COLUMNS]`` of a matrix, zero outside its ``rows x columns``."""
    if DESCRIPTOR:
        return source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        pointers = source + r[:, None].to(tl.int64) * stride_row + c[None, :] * stride_column
        return tl.load(pointers, mask=(r[:, None] < rows) & (c[None, :] < columns), other=0.0)


@triton.jit
def store_tile(out, tile, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write ``[ROWS, COLUMNS]`` into a ``rows x columns`` matrix with contiguous rows, ``stride`` apart."""
    r = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, COLUMNS)
    pointers = out + r[:, None].to(tl.int64) * stride + c[None, :]
    tl.store(pointers, tile.to(out.dtype.element_ty), mask=(r[:, None] < rows) & (c[None, :] < columns))


def tile_views(matrix: Tensor, blocks: list[tuple[int, int]], descriptor: bool) -> list:
    """The matrix as a kernel takes it for tiles of these shapes: descriptors, or the tensor itself once per tile.

    A tile of no columns stands for an absent piece.
    """
    if not descriptor:
        return [matrix] * len(blocks)
    made = {b: TensorDescriptor.from_tensor(matrix, list(b)) if 0 not in b else matrix for b in set(blocks)}
    return [made[block] for block in blocks]


def with_aligned_rows(matrix: Tensor) -> Tensor:
    """The matrix itself, or a copy in rows that tensor descriptors and wide loads can address.

    Ranks that are no multiple of 8 leave a factor's rows at odd addresses; reading such a factor tile by tile costs far
    more than this one copy of it.
    """
    if describable(matrix):
        return matrix
    return empty_with_aligned_rows(matrix.shape[0], matrix.shape[1], matrix).copy_(matrix)


def empty_with_aligned_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """``[rows, columns]``, uninitialised, each row at a multiple of 16 elements."""
    return like.new_empty(rows, aligned_columns(columns))[:, :columns]


def aligned_columns(columns: int) -> int:
    """Distance in elements of rows that tensor descriptors can address."""
    return -(-columns // 16) * 16


def head_columns(dim: int) -> int:
    """Columns of a tile of heads of this size."""
    return triton.next_power_of_2(max(dim, 16))


def by_items(heads: Tensor) -> Tensor:
    """``[items, len, heads, dim]``, items of one size apart and heads adjacent, as ``[items, len, heads * dim]``.

    A descriptor of it has zeros behind an item's last row.
    """
    items, length, count, dim = heads.shape
    row = heads.stride(0) // max(1, length) if items > 1 else heads.stride(1)  # of one row views have any stride
    return heads.as_strided((items, length, count * dim), (length * row, row, 1))
