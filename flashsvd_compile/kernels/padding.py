"""A factor copied to where its rows are aligned, with zeros behind its rows or columns."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK_ROWS, BLOCK_COLUMNS = 16, 256


@triton.jit
def padding_kernel(
    source, out, rows, columns, stride_row, stride_column, out_rows, out_columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    c = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    pointers = source + r.to(tl.int64) * stride_row + c.to(tl.int64) * stride_column
    tile = tl.load(pointers, mask=(r < rows) & (c < columns), other=0.0)
    tl.store(out + r.to(tl.int64) * out_columns + c, tile, mask=(r < out_rows) & (c < out_columns))


def padded_copy(source: Tensor, out: Tensor) -> Tensor:
    """Fill the contiguous ``out[rows, columns]`` with the smaller ``source``, any strides, and zeros behind it."""
    launch(
        padding_kernel,
        (triton.cdiv(out.shape[0], BLOCK_ROWS), triton.cdiv(out.shape[1], BLOCK_COLUMNS)),
        source,
        out,
        *source.shape,
        *source.stride(),
        *out.shape,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_warps=4,
    )
    return out
