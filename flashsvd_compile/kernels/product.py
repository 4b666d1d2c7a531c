"""Products and what follows them in one launch, where there is a kernel for that.

In half precision there are :mod:`.product_hopper`, whose products are no faster than the library's, and
:mod:`.small_products`, which takes several in a launch; in float32 :mod:`.product_single`, whose products are faster.
"""

import torch
import triton
from torch import Tensor

from . import product_single, small_products
from .operands import Product, Rotation
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


def takes(product: Product, *beside: Tensor) -> bool:
    """Whether a kernel computes the product, and what is beside it can be read."""
    x, weight, _, out = product
    target = target_of(x.device)
    if x.dtype == torch.float32:
        return product_single.takes(target, out.shape) and _is_single(product, *beside)
    if x.element_size() != 2 or not multiplies(target, *out.shape):
        return False
    return reads_fast(x) and reads_fast(weight) and all(map(describable, (out, *beside)))


ROTATED_HEAD, ROTATED_ROWS = 128, 64
"""Features of a head that a kernel rotates, and rows that it does at a time."""


def rotates(product: Product, rotation: Rotation, wraps: bool) -> bool:
    """Whether a kernel computes the product and rotates it: whole heads, by tables of their dtype.

    Args:
        wraps: whether rows go on at the first position behind the last. No rows that come at a time may do so.
    """
    positions, features = rotation.cos.shape
    in_order = not wraps or (positions % ROTATED_ROWS == 0 and rotation.first % ROTATED_ROWS == 0)
    whole = features == ROTATED_HEAD and product.out.shape[1] % features == 0
    alike = rotation.cos.dtype == product.out.dtype != torch.float32
    return in_order and whole and alike and takes(product, rotation.cos, rotation.sin)


def _is_single(product: Product, *beside: Tensor) -> bool:
    """Whether the kernels of float32 read and write these matrices."""
    x, weight, _, out = product
    single = all(matrix.dtype == torch.float32 for matrix in (*product, *beside) if matrix is not None)
    by_rows = all(result.stride(1) == 1 for result in (out, *beside))
    return single and by_rows and describable(x) and describable(weight)


def multiplies_faster(product: Product) -> bool:
    """Whether a kernel's product alone is faster than the library's."""
    return product.x.dtype == torch.float32 and takes(product)


def multiplies_pair_faster(first: Product, second: Product) -> bool:
    """Whether one launch of both products is faster than one after the other by the library."""
    if first.x.dtype == torch.float32:
        faster = product_single.takes(target_of(first.x.device), first.out.shape, second.out.shape)
        return faster and _is_single(first) and _is_single(second)
    return small_products.faster(first[:2], second[:2])


def multiply_pair(first: Product, second: Product) -> None:
    """Fill both results in one launch, of products for which :func:`multiplies_pair_faster`."""
    if first.x.dtype == torch.float32:
        product_single.product_pair(first, second)
    else:
        small_products.multiply_together(small_products.Small(*first), small_products.Small(*second))


def multiply(
    product: Product,
    activation: str | None = None,
    gate: Tensor | Product | None = None,
    residual: Tensor | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Fill and return the product's ``out``: ``act(x @ weight.T + bias) * gate + residual``, or rotated.

    Args:
        product: what a kernel :func:`takes`; or in half precision one whose operands it :func:`reads_fast`, and whose
            result has 16-byte aligned rows of a multiple of 8 columns. Columns of the result behind the weight's rows,
            within 64, become zero.
        activation: a name of ``ops.activation.ACTIVATIONS``; ``None`` is the identity.
        gate: like ``out``, may be ``out`` itself; of half precision also a product to the same ``out``.
        residual: like ``out``, may be ``out`` itself.
        rotation: what a kernel :func:`rotates`. One of the three may be given.
    """
    if product.x.dtype == torch.float32:
        product_single.product_single(product, activation, gate, residual)
    else:
        from .product_hopper import product_hopper

        product_hopper(product, activation, gate, residual, rotation)
    return product.out
