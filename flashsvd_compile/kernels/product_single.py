"""A product in float32 on tensor cores, and what follows it in one launch; or two products that nothing follows.

    out = act(x @ weight.T + bias)        or        ... * gate        or        ... + residual

Tensor cores cut float32 to tf32, of 11 significant bits. An operand is therefore taken as the sum of two: the nearest
of 11 bits, and what remains. Three products of these give what float32 holds. Those of leading parts are summed apart
for each step and then added to the sum so far by the vector units, because tensor cores truncate what they add up
(Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores", 2022). Triton's ``tf32x3`` does the same,
but looks for NaN and infinities in every step, which takes an eighth longer; here a tile that met one is done again.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .autotune import about, tuned
from .launch import launch
from .operands import Product
from .target import Target, allows_tf32, describable, occupies, target_of
from .tiles import Tile, load_tile, store_tile, tile_views

TILE = Tile(64, 64, 4, 4)
"""As fast as larger ones for large results, and a quarter faster for small ones (H100)."""
DEPTH = 16
"""Depth of a step, which is a matter of exactness and not of tuning.

Truncation makes sums of 16 products smaller by 5e-8 of themselves, of 32 by 9e-8, of 64 by 15e-8, whatever the matrices
are. Errors of one sign add up from layer to layer, where those of rounding cancel: BERT errs 1.00, 1.33 and 2.04 times
as much as by the library. It takes 37 ms in steps of 16, by ``tf32x3`` 40, 34 and 34, by the library 48 (H100, 32x512).
"""
GROUP = tl.constexpr(8)
"""Blocks of rows whose tiles come together, to share operands in the L2."""


def takes(target: Target, *shapes: Sequence[int]) -> bool:
    """Whether a launch is faster than the library: on the chip, and for results of these ``[rows, columns]``."""
    if not target.triple_tf32 or allows_tf32():
        return False
    return occupies(target, sum(_tiles(shape, TILE) for shape in shapes))


def _tiles(shape: Sequence[int], tile: Tile) -> int:
    rows, columns = shape
    return triton.cdiv(rows, tile.block_n) * triton.cdiv(columns, tile.block_f)


@triton.jit
def _leading(x):
    """The nearest of 11 significant bits, ties away from zero, so that what remains is of either sign.

    Of an infinity and of NaN, NaN remains.
    """
    return ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def _one_tile(
    index, x, weight, bias, beside, out, rows, columns, depth,
    stride_x, stride_xk, stride_weight, stride_weight_k, stride_beside, stride_out,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, DEPTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BESIDE: tl.constexpr, DESCRIPTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(columns, BLOCK_F)
    first_block = index // (GROUP * column_blocks) * GROUP
    together = tl.minimum(GROUP, tl.cdiv(rows, BLOCK_N) - first_block)
    index -= first_block * column_blocks
    row = (first_block + index % together) * BLOCK_N
    column = index // together * BLOCK_F

    result = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    trailing = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)  # so small that its truncation is below float32's rounding
    for k in tl.range(0, depth, DEPTH, num_stages=STAGES):
        left = load_tile(x, row, k, rows, depth, stride_x, stride_xk, BLOCK_N, DEPTH, DESCRIPTOR)
        right = load_tile(weight, column, k, columns, depth, stride_weight, stride_weight_k, BLOCK_F, DEPTH,
                          DESCRIPTOR)  # fmt: skip
        left_leading, right_leading = _leading(left), _leading(right)
        trailing = tl.dot(left - left_leading, right_leading.T, trailing, input_precision="tf32")
        trailing = tl.dot(left_leading, (right - right_leading).T, trailing, input_precision="tf32")
        # The bound on what tensor cores add up keeps Triton from having them add the sum so far.
        result += tl.dot(left_leading, right_leading.T, input_precision="tf32", max_num_imprecise_acc=DEPTH)
    result += trailing
    if tl.max((trailing != trailing).to(tl.int32)) > 0:  # by infinities and NaN
        result = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
        for k in tl.range(0, depth, DEPTH):
            left = load_tile(x, row, k, rows, depth, stride_x, stride_xk, BLOCK_N, DEPTH, DESCRIPTOR)
            right = load_tile(weight, column, k, columns, depth, stride_weight, stride_weight_k, BLOCK_F, DEPTH,
                              DESCRIPTOR)  # fmt: skip
            result = tl.dot(left, right.T, result, input_precision="tf32x3")
    c = column + tl.arange(0, BLOCK_F)
    if HAS_BIAS:
        result += tl.load(bias + c, mask=c < columns, other=0.0)[None, :]
    if ACTIVATION is not None:
        result = activate(result, ACTIVATION, False, False)
    if BESIDE is not None:
        other = load_tile(beside, row, column, rows, columns, stride_beside, 1, BLOCK_N, BLOCK_F, False)
        result = result * other if BESIDE == "gate" else result + other
    store_tile(out, result, row, column, rows, columns, stride_out, BLOCK_N, BLOCK_F)


@triton.jit
def product_single_kernel(
    x, weight, bias, beside, out, rows, columns, depth,
    stride_x, stride_xk, stride_weight, stride_weight_k, stride_beside, stride_out,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, DEPTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BESIDE: tl.constexpr, DESCRIPTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of the result."""
    _one_tile(
        tl.program_id(0), x, weight, bias, beside, out, rows, columns, depth,
        stride_x, stride_xk, stride_weight, stride_weight_k, stride_beside, stride_out,
        BLOCK_N, BLOCK_F, DEPTH, HAS_BIAS, ACTIVATION, BESIDE, DESCRIPTOR, STAGES,
    )  # fmt: skip


@triton.jit
def product_pair_kernel(
    x_a, weight_a, bias_a, beside_a, out_a, rows_a, columns_a, depth_a,
    stride_x_a, stride_xk_a, stride_weight_a, stride_weight_k_a, stride_beside_a, stride_out_a,
    x_b, weight_b, bias_b, beside_b, out_b, rows_b, columns_b, depth_b,
    stride_x_b, stride_xk_b, stride_weight_b, stride_weight_k_b, stride_beside_b, stride_out_b, tiles_a,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, DEPTH: tl.constexpr, BIAS_A: tl.constexpr, BIAS_B: tl.constexpr,
    DESCRIPTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of the first result or of the second."""
    index = tl.program_id(0)
    if index < tiles_a:
        _one_tile(
            index, x_a, weight_a, bias_a, beside_a, out_a, rows_a, columns_a, depth_a,
            stride_x_a, stride_xk_a, stride_weight_a, stride_weight_k_a, stride_beside_a, stride_out_a,
            BLOCK_N, BLOCK_F, DEPTH, BIAS_A, None, None, DESCRIPTOR, STAGES,
        )  # fmt: skip
    else:
        _one_tile(
            index - tiles_a, x_b, weight_b, bias_b, beside_b, out_b, rows_b, columns_b, depth_b,
            stride_x_b, stride_xk_b, stride_weight_b, stride_weight_k_b, stride_beside_b, stride_out_b,
            BLOCK_N, BLOCK_F, DEPTH, BIAS_B, None, None, DESCRIPTOR, STAGES,
        )  # fmt: skip


def product_single(
    product: Product,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Fill the product's ``out`` as above.

    Args:
        product: of float32; operands of any strides, ``out`` with contiguous rows.
        activation: a name of ``ops.activation.ACTIVATIONS``; ``None`` is the identity.
        gate: like ``out``, may be ``out`` itself; multiplied with the activated product.
        residual: like ``out``, may be ``out`` itself; added. One of the two may be given.
        tile: overrides the table.
    """
    out, descriptor = product.out, _is_described(product)
    tile = tile or _chosen_tile(product, activation, gate, residual, descriptor)
    beside = gate if gate is not None else residual
    launch(
        product_single_kernel,
        (_tiles(out.shape, tile), 1),
        *_arguments(product, tile, descriptor, out if beside is None else beside),
        BLOCK_N=tile.block_n,
        BLOCK_F=tile.block_f,
        DEPTH=DEPTH,
        HAS_BIAS=product.bias is not None,
        ACTIVATION=activation,
        BESIDE=None if beside is None else "gate" if gate is not None else "residual",
        DESCRIPTOR=descriptor,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


def product_pair(first: Product, second: Product) -> None:
    """Fill both results in one launch, for products too small to occupy the chip one after the other."""
    tile, descriptor = TILE, _is_described(first, second)
    tiles = [_tiles(product.out.shape, tile) for product in (first, second)]
    launch(
        product_pair_kernel,
        (sum(tiles), 1),
        *_arguments(first, tile, descriptor, first.out),
        *_arguments(second, tile, descriptor, second.out),
        tiles[0],
        BLOCK_N=tile.block_n,
        BLOCK_F=tile.block_f,
        DEPTH=DEPTH,
        BIAS_A=first.bias is not None,
        BIAS_B=second.bias is not None,
        DESCRIPTOR=descriptor,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        maxnreg=128,  # or the two branches take 136, and a program fewer fits on a processor
    )


def _is_described(*products: Product) -> bool:
    """Whether tiles of all operands come through descriptors."""
    described = all(describable(product.x) and describable(product.weight) for product in products)
    return target_of(products[0].x.device).descriptors and described


def _arguments(product: Product, tile: Tile, descriptor: bool, beside: Tensor) -> list:
    """The kernels' leading arguments."""
    x, weight, bias, out = product
    return [
        *tile_views(x, [(tile.block_n, DEPTH)], descriptor),
        *tile_views(weight, [(tile.block_f, DEPTH)], descriptor),
        x if bias is None else bias.contiguous(),
        beside,
        out,
        *out.shape,
        x.shape[1],
        *x.stride(),
        *weight.stride(),
        beside.stride(0),
        out.stride(0),
    ]


def _chosen_tile(
    product: Product, activation: str | None, gate: Tensor | None, residual: Tensor | None, descriptor: bool
) -> Tile:
    (rows, depth), columns = product.x.shape, product.weight.shape[0]

    def run(tile: Tile) -> list[Tensor]:
        elsewhere = product.x.new_empty(rows, columns)  # what is beside may be out
        product_single(product._replace(out=elsewhere), activation, gate, residual, tile)
        return [elsewhere]

    return tuned(
        "product_single",
        [TILE],
        run,
        product.x,
        rows=about(rows),
        columns=columns,
        depth=depth,
        bias=product.bias is not None,
        activation=str(activation),
        beside=gate is not None or residual is not None,
        descriptor=descriptor,
    )
