"""Products and what follows them in one launch, where there is a kernel for that: :mod:`.product_hopper`."""

import triton
from torch import Tensor

from .target import Target, describable, occupies, speaks_gluon, target_of

SECTOR = 16
"""Elements of half precision in 32 bytes, which memory hands out together. Rows that begin half a sector off take a
third longer (H100)."""


def multiplies(target: Target, rows: int, columns: int) -> bool:
    """Whether the kernel runs on the chip, and a result this large occupies it."""
    tiles = triton.cdiv(rows, 128) * triton.cdiv(columns, 256)
    return speaks_gluon(target) and columns % 8 == 0 and occupies(target, tiles)


def reads_fast(matrix: Tensor) -> bool:
    """Whether each row of an operand begins at a whole sector, or at a fixed distance from one."""
    return describable(matrix) and matrix.stride(0) % SECTOR == 0


def takes(x: Tensor, weight: Tensor, *others: Tensor) -> bool:
    """Whether the kernel computes ``x @ weight.T`` from and to these matrices, ``others`` like the result."""
    if x.element_size() != 2 or not multiplies(target_of(x.device), x.shape[0], weight.shape[0]):
        return False
    return reads_fast(x) and reads_fast(weight) and all(map(describable, others))


def activated_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor, gated: bool = False
) -> Tensor:
    """Fill and return ``out[rows, columns]``: ``act(x @ weight.T + bias)``, if ``gated`` times what it holds before.

    Args:
        x, weight: ``[rows, depth]`` and ``[columns, depth]``, half precision, what :func:`reads_fast`.
        bias: ``[columns]`` or ``None``.
        activation: a name of ``ops.activation.ACTIVATIONS``.
        out: rows 16-byte aligned, of a multiple of 8 columns.
    """
    from .product_hopper import product_hopper

    product_hopper(x, weight, bias, out, activation, gate=out if gated else None)
    return out


def product_with_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, out: Tensor) -> Tensor:
    """Fill and return ``out[rows, columns]``: ``x @ weight.T + bias + residual``, of what the kernel :func:`takes`."""
    from .product_hopper import product_hopper

    product_hopper(x, weight, bias, out, residual=residual)
    return out
