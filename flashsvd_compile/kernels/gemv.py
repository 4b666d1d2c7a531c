"""Products of a few rows with whole weights, up to three of them in one launch, each weight read once.

    out_j = x_j @ weight_j.T + bias_j                                    for up to three j
    out = act(x_0 @ weight_0.T + bias_0) * (x_1 @ weight_1.T + bias_1)   of a gated pair
    out = x @ weight.T + bias + residual

What bounds such a product is the memory that the weights come from. So a program takes a few of a weight's rows, reads
them 16 bytes at a time, and reads ahead; a launch that follows another one may begin before that ends (``follows``).

A rank that is no multiple of 8 leaves the rows of an up factor at odd addresses, where nothing can be read 16 bytes at
a time. But every eighth row is out of line by the same distance: a program takes such rows, starts each of them at the
boundary before its first element, and shifts ``x`` instead; several rows of ``x`` come in copies that are shifted
already (:func:`shifted_rows`).

A root mean square norm of a single row is part of the products that read it: these go over all of the row anyway, and
what it is divided by is the same for all of its elements.

Up to eight rows of half precision go through :mod:`.gemv_hopper` where they can, norms included.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .launch import launch, take_turn
from .operands import Product, RmsNorm
from .target import Target, describable, speaks_gluon, target_of
from .tiles import aligned_columns

MAX_ROWS = 16
MAX_ON_HOPPER = 8
"""Rows that :mod:`.gemv_hopper` takes at most, as many as a product of the tensor cores has at least. With 16 it would
read as much out of the L2 as of the weights, and is 15 % slower than the kernel here (H200)."""
MAX_PRODUCTS = 3
PERIOD = 8
"""Every ``PERIOD``-th row of a contiguous matrix of half precision is as far from a 16-byte boundary as the first."""
NEIGHBOURS = tl.constexpr(8)
"""Squares that a thread adds up before it keeps them, in one register for eight. A register each would be too many: 168
are what leaves room for the three programs a processor that a deep product of one row has (8.2 us; with two 10.9)."""


class Tile(NamedTuple):
    """Launch configuration.

    Attributes:
        block_f, block_k: features and depth of a tile of weights.
        split: tiles side by side that several rows take in a step, one a warp or more: few features of great depth
            leave no other way to occupy the chip.
    """

    block_f: int
    block_k: int
    num_warps: int
    num_stages: int
    split: int = 1


def tile_of(target: Target, rows: int, itemsize: int, features: int, depth: int, gated: bool, edges: bool) -> Tile:
    """The fastest measured configuration (sm_90; ``benchmarks/NOTES.md``).

    Args:
        features: those of all products of the launch together.
        depth: the greatest of all products.
        gated: a program takes two tiles of weights.
        edges: two of a row's tiles pass through registers, and are shorter for it.
    """
    deep = depth > 2048
    if rows > 1:
        if target.name == "gfx942":
            return Tile(16, 128, 2, 2)
        if deep:
            return Tile(8, 128, 4, 4, split=4)
        if gated:
            return Tile(32, 64, 2, 6) if edges else Tile(32, 128, 2, 4)
        if edges:
            return Tile(16, 64, 2, 6, split=2)
        return Tile(32, 128, 2, 4) if features > 8192 else Tile(16, 128, 2, 4, split=2)
    if itemsize == 4:
        return Tile(4, 512, 4, 1)
    if deep:
        if not target.descriptors:
            return Tile(4, 1024, 4, 1)
        return Tile(8, 1024, 4, 1) if features > 2048 else Tile(4, 2048, 8, 1)
    return Tile(4 if gated else 8, 512, 4, 1)


@triton.jit
def _features(block, BLOCK_F: tl.constexpr, PERIOD: tl.constexpr):
    """The weight's rows that a program takes, ``PERIOD`` apart."""
    return block % PERIOD + PERIOD * ((block // PERIOD) * BLOCK_F + tl.arange(0, BLOCK_F))


@triton.jit
def _product(
    x, weight, bias, norm_weight, norm_eps, block, rows, features, depth, stride_x, stride_copy, stride_w,
    NORM: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, ALIGN: tl.constexpr, PERIOD: tl.constexpr, EDGES: tl.constexpr, SHIFTED: tl.constexpr,
    TURN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``[ROWS, BLOCK_F]`` of a product in float32.

    Columns are counted from the 16-byte boundary before the weight's rows, ``lead`` elements before their first.
    """
    f = _features(block, BLOCK_F, PERIOD)
    lead = (block % PERIOD) * stride_w % ALIGN
    if ROWS == 1:
        acc = _one_row(
            x, weight, norm_weight, norm_eps, f, lead, features, depth, stride_w, NORM, BLOCK_F, BLOCK_K, ALIGN, EDGES,
            TURN,
        )[None, :]  # fmt: skip
    else:
        acc = _several_rows(
            x, weight, f, lead, rows, features, depth, stride_x, stride_copy, stride_w, ROWS, BLOCK_F, BLOCK_K, SPLIT,
            ALIGN, EDGES, SHIFTED, STAGES,
        )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias + f, mask=f < features, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _weights(weight, f, k, features, stop, stride, lead, ALIGN: tl.constexpr, BLOCK_K: tl.constexpr):
    """``[BLOCK_F, BLOCK_K]`` of the weight, columns counted from ``lead`` elements before its rows' first."""
    offsets = f[:, None].to(tl.int64) * stride + (k[None, :] - lead)
    if ALIGN > 1:
        offsets = tl.max_contiguous(tl.multiple_of(offsets, [1, ALIGN]), [1, BLOCK_K])
    return tl.load(weight + offsets, mask=(f[:, None] < features) & (k[None, :] < stop), other=0.0)


@triton.jit
def _one_row(
    x, weight, norm_weight, norm_eps, f, lead, features, depth, stride_w,
    NORM: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr, EDGES: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_F]``, with the next tile of weights on its way while this one is multiplied."""
    k = tl.arange(0, BLOCK_K)
    stop = tl.cdiv(lead + depth, ALIGN) * ALIGN  # whole pieces of 16 bytes
    if TURN == "first":
        take_turn()
    tile = _weights(weight, f, k, features, stop, stride_w, lead, ALIGN, BLOCK_K)
    if TURN == "behind weights":
        take_turn()
    sums = tl.zeros([BLOCK_F, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K // NEIGHBOURS], tl.float32)
    for start in range(0, stop, BLOCK_K):
        following = _weights(weight, f, start + BLOCK_K + k, features, stop, stride_w, lead, ALIGN, BLOCK_K)
        column = start + k - lead
        inside = (column >= 0) & (column < depth)
        part = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        if NORM is not None:
            squares += tl.sum(tl.reshape(part * part, [BLOCK_K // NEIGHBOURS, NEIGHBOURS]), 1)
        if NORM == "weighted":
            part *= tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
        if EDGES:
            tile = tl.where(inside[None, :], tile, 0.0)
        sums += tile.to(tl.float32) * part[None, :]
        tile = following
    result = tl.sum(sums, 1)
    if NORM is not None:
        result /= tl.sqrt(tl.sum(squares) / depth + norm_eps)
    return result


@triton.jit
def _several_rows(
    x, weight, f, lead, rows, features, depth, stride_x, stride_copy, stride_w,
    ROWS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr,
    EDGES: tl.constexpr, SHIFTED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``[ROWS, BLOCK_F]``; of each step's depth ``SPLIT`` warps take a part.

    Where rows of weights have neighbours within a piece of 16 bytes, these are hidden in the first and the last step,
    whose tiles pass through registers for it; all others go from memory to the matrix units as they are.
    """
    STEP: tl.constexpr = SPLIT * BLOCK_K
    b, end = tl.arange(0, ROWS)[:, None], lead + depth
    stop = tl.cdiv(end, ALIGN) * ALIGN  # whole pieces of 16 bytes
    k = tl.arange(0, SPLIT)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    k, f = k[:, None, :], f[None, :, None]
    parts = tl.zeros([SPLIT, ROWS, BLOCK_F], tl.float32)
    if EDGES:
        last = tl.cdiv(stop, STEP) * STEP - STEP
        end_of_last = tl.where(last == 0, 0, end)  # the first step may be all there is
        first_tile, first_part = _edge(
            x, weight, b, f, k, lead, end, stop, rows, features, stride_x, stride_copy, stride_w, SHIFTED, ALIGN,
            BLOCK_K,
        )  # fmt: skip
        last_tile, last_part = _edge(
            x, weight, b, f, last + k, lead, end_of_last, stop, rows, features, stride_x, stride_copy, stride_w,
            SHIFTED, ALIGN, BLOCK_K,
        )  # fmt: skip
        for start in tl.range(STEP, last, STEP, num_stages=STAGES):
            tile = _tile(weight, f, start + k, lead, stride_w, f < features, ALIGN, BLOCK_K)
            part = _part(x, b, start + k, lead, stride_x, stride_copy, b < rows, SHIFTED, ALIGN, BLOCK_K)
            parts = tl.dot(part, tl.permute(tile, (0, 2, 1)), parts)
        parts = tl.dot(first_part, tl.permute(first_tile, (0, 2, 1)), parts)
        parts = tl.dot(last_part, tl.permute(last_tile, (0, 2, 1)), parts)
    else:
        for start in tl.range(0, stop, STEP, num_stages=STAGES):
            here = start + k
            tile = _tile(weight, f, here, lead, stride_w, (f < features) & (here < stop), ALIGN, BLOCK_K)
            part = _part(x, b, here, lead, stride_x, stride_copy, (b < rows) & (here < stop), SHIFTED, ALIGN, BLOCK_K)
            parts = tl.dot(part, tl.permute(tile, (0, 2, 1)), parts)
    return tl.sum(parts, 0)


@triton.jit
def _edge(
    x, weight, b, f, here, lead, end, stop, rows, features, stride_x, stride_copy, stride_w,
    SHIFTED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile and a part with zeros before ``lead`` and from ``end`` on."""
    inside, read = (here >= lead) & (here < end), here < stop
    tile = _tile(weight, f, here, lead, stride_w, (f < features) & read, ALIGN, BLOCK_K)
    known = read if SHIFTED else inside
    part = _part(x, b, here, lead, stride_x, stride_copy, (b < rows) & known, SHIFTED, ALIGN, BLOCK_K)
    return tl.where(inside, tile, 0.0), tl.where(inside, part, 0.0)


@triton.jit
def _tile(weight, f, here, lead, stride, mask, ALIGN: tl.constexpr, BLOCK_K: tl.constexpr):
    """``[SPLIT, BLOCK_F, BLOCK_K]`` of the weight, columns counted from ``lead`` elements before its rows' first."""
    offsets = f.to(tl.int64) * stride + (here - lead)
    if ALIGN > 1:
        offsets = tl.max_contiguous(tl.multiple_of(offsets, [1, 1, ALIGN]), [1, 1, BLOCK_K])
    return tl.load(weight + offsets, mask=mask, other=0.0)


@triton.jit
def _part(
    x, b, here, lead, stride, stride_copy, mask, SHIFTED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``[SPLIT, ROWS, BLOCK_K]`` of the rows, or of the copy of them that is in line with the weight's."""
    if not SHIFTED:
        return tl.load(x + b * stride + (here - lead), mask=mask, other=0.0)
    offsets = b * stride + (lead * (stride_copy - 1) + here)
    offsets = tl.max_contiguous(tl.multiple_of(offsets, [1, 1, ALIGN]), [1, 1, BLOCK_K])
    return tl.load(x + offsets, mask=mask, other=0.0)


@triton.jit
def _store(
    out, result, residual, block, rows, features, stride, stride_copy, stride_residual,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr, PERIOD: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    f, b = _features(block, BLOCK_F, PERIOD), tl.arange(0, ROWS)
    mask = (b[:, None] < rows) & (f[None, :] < features)
    if RESIDUAL:
        added = residual + b[:, None] * stride_residual + f[None, :]
        result += tl.load(added, mask=mask, other=0.0).to(tl.float32)
    result = result.to(out.dtype.element_ty)
    for copy in tl.static_range(COPIES):
        tl.store(out + copy * stride_copy + b[:, None] * stride + f[None, :], result, mask=mask)


@triton.jit
def gemv_kernel(
    x_0, weight_0, bias_0, out_0, x_1, weight_1, bias_1, out_1, x_2, weight_2, bias_2, out_2,
    norm_weight, residual, norm_eps, stride_residual, rows, blocks_0, blocks_1,
    features_0, depth_0, stride_x_0, copy_x_0, stride_w_0, stride_out_0, copy_out_0,
    features_1, depth_1, stride_x_1, copy_x_1, stride_w_1, stride_out_1, copy_out_1,
    features_2, depth_2, stride_x_2, copy_x_2, stride_w_2, stride_out_2, copy_out_2,
    PRODUCTS: tl.constexpr, BIAS_0: tl.constexpr, BIAS_1: tl.constexpr, BIAS_2: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, PERIOD: tl.constexpr, EDGES: tl.constexpr,
    SHIFTED: tl.constexpr, COPIES: tl.constexpr, TURN: tl.constexpr, APPROXIMATE: tl.constexpr,
    HARDWARE_TANH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of features of the product that ``program_id(0)`` falls into, or of both products of a gated pair."""
    block = tl.program_id(0)
    if GATED or block < blocks_0:
        result = _product(
            x_0, weight_0, bias_0, norm_weight, norm_eps, block, rows, features_0, depth_0, stride_x_0, copy_x_0,
            stride_w_0, NORM, ROWS, BIAS_0, BLOCK_F, BLOCK_K, SPLIT, ALIGN, PERIOD, EDGES, SHIFTED, TURN, STAGES,
        )  # fmt: skip
        if ACTIVATION is not None:
            result = activate(result, ACTIVATION, APPROXIMATE, HARDWARE_TANH)
        if GATED:
            result *= _product(
                x_1, weight_1, bias_1, norm_weight, norm_eps, block, rows, features_1, depth_1, stride_x_1, copy_x_1,
                stride_w_1, NORM, ROWS, BIAS_1, BLOCK_F, BLOCK_K, SPLIT, ALIGN, PERIOD, EDGES, SHIFTED, None, STAGES,
            )  # fmt: skip
        _store(
            out_0, result, residual, block, rows, features_0, stride_out_0, copy_out_0, stride_residual, RESIDUAL, ROWS,
            BLOCK_F, PERIOD, COPIES,
        )  # fmt: skip
    elif PRODUCTS == 2 or (PRODUCTS > 1 and block < blocks_0 + blocks_1):
        block -= blocks_0
        result = _product(
            x_1, weight_1, bias_1, norm_weight, norm_eps, block, rows, features_1, depth_1, stride_x_1, copy_x_1,
            stride_w_1, NORM, ROWS, BIAS_1, BLOCK_F, BLOCK_K, SPLIT, ALIGN, PERIOD, EDGES, SHIFTED, TURN, STAGES,
        )  # fmt: skip
        _store(
            out_1, result, residual, block, rows, features_1, stride_out_1, copy_out_1, stride_residual, False, ROWS,
            BLOCK_F, PERIOD, COPIES,
        )  # fmt: skip
    elif PRODUCTS > 2:
        block -= blocks_0 + blocks_1
        result = _product(
            x_2, weight_2, bias_2, norm_weight, norm_eps, block, rows, features_2, depth_2, stride_x_2, copy_x_2,
            stride_w_2, NORM, ROWS, BIAS_2, BLOCK_F, BLOCK_K, SPLIT, ALIGN, PERIOD, EDGES, SHIFTED, TURN, STAGES,
        )  # fmt: skip
        _store(
            out_2, result, residual, block, rows, features_2, stride_out_2, copy_out_2, stride_residual, False, ROWS,
            BLOCK_F, PERIOD, COPIES,
        )  # fmt: skip


def shifted_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """``[PERIOD, rows, columns]``, uninitialised: copies that each start an element further from a 16-byte boundary.

    What a product reads whose weight has rows at odd addresses: of its ``PERIOD`` copies the one in line with a row.
    """
    width = aligned_columns(columns + PERIOD)
    memory = like.new_empty(PERIOD, rows, width)
    return memory.as_strided((PERIOD, rows, columns), (rows * width + 1, width, 1))


def supported(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the kernel takes these rows and weights: contiguous rows, and few of them.

    Several rows of float32 are left to the library: a sum in the order of the products would be less accurate.
    """
    contiguous = x.stride(-1) == 1 and all(weight.stride(1) == 1 for weight in weights)
    return contiguous and 0 < x.shape[0] <= (MAX_ROWS if x.element_size() == 2 else 1) and x.element_size() <= 4


def takes_hopper(*products: Product) -> bool:
    """Whether the kernel for several rows on Hopper computes these products."""
    xs, weights = [product.x for product in products], [product.weight for product in products]
    if not _several_on_hopper(xs[0]) or not all(weight.numel() for weight in weights):
        return False
    if not has_odd_rows(weights):
        return all(map(describable, (*xs, *weights)))
    whole = all(w.is_contiguous() and w.shape[0] % PERIOD == 0 and w.data_ptr() % 16 == 0 for w in weights)
    return whole and all(x.dim() == 3 for x in xs)


def normalises(x: Tensor, weights: Sequence[Tensor], norm: RmsNorm) -> bool:
    """Whether a kernel that multiplies ``x[rows, depth]`` with these weights takes this norm of it.

    Several rows are multiplied with the norm's weight before they are divided by anything, which float16 has no range
    for.
    """
    if len(x) == 1:
        return True
    in_range = norm.weight is None or x.dtype == torch.bfloat16
    products = [Product(x, weight, None, x) for weight in weights]
    return in_range and not has_odd_rows(weights) and takes_hopper(*products)


def _several_on_hopper(x: Tensor) -> bool:
    """Whether these are several rows of half precision, or shifted copies of such, where Gluon is spoken."""
    return speaks_gluon(target_of(x.device)) and 1 < x.shape[-2] <= MAX_ON_HOPPER and x.element_size() == 2


def has_odd_rows(weights: Sequence[Tensor]) -> bool:
    """Whether rows of half precision follow each other at other distances than multiples of 16 bytes."""
    return any(weight.stride(0) % PERIOD for weight in weights)


class Fused(NamedTuple):
    """What a launch computes beside its products; see :func:`multiply`."""

    activation: str | None
    gated: bool
    norm: RmsNorm | None
    residual: Tensor | None

    def arguments(self, absent: Tensor) -> tuple[Tensor, Tensor, float, int]:
        """The kernels' arguments; a tensor in the place of absent ones."""
        weight = None if self.norm is None else self.norm.weight
        return (
            absent if weight is None else weight,
            absent if self.residual is None else self.residual,
            0.0 if self.norm is None else self.norm.eps,
            0 if self.residual is None else self.residual.stride(0),
        )

    def constants(self) -> dict[str, str | bool | None]:
        """The kernels' constants."""
        norm = None if self.norm is None else "plain" if self.norm.weight is None else "weighted"
        residual = self.residual is not None
        return {"NORM": norm, "RESIDUAL": residual, "ACTIVATION": self.activation, "GATED": self.gated}


def multiply(
    *products: Product,
    activation: str | None = None,
    gated: bool = False,
    norm: RmsNorm | None = None,
    residual: Tensor | None = None,
    follows: bool = False,
    tile: Tile | None = None,
) -> None:
    """Fill each product's ``out``.

    Args:
        products: up to three that are :func:`supported`, of one dtype and one number of rows. Matrices have contiguous
            rows; ``x`` and ``out`` may be :func:`shifted_rows`, all of which are written.
        activation: applied to the one product, or to the first of a gated pair.
        gated: the pair's first result times its second, as wide, into the first one's ``out``.
        norm: taken of all products' ``x`` first, where a kernel :func:`normalises`.
        residual: ``[rows, features]``, added to the result of the one product.
        follows: the launch before this one on the stream was a ``multiply`` too, and no weight was written since it
            began: weights are then read while it still runs. Otherwise nothing is.
        tile: overrides the table.
    """
    weight_of_norm = None if norm is None else norm.weight
    if not all(map(_in_line, (*(product.bias for product in products), weight_of_norm, residual))):
        products = tuple(product._replace(bias=_copied_into_line(product.bias)) for product in products)
        norm = None if norm is None else norm._replace(weight=_copied_into_line(norm.weight))
        residual, follows = _copied_into_line(residual), False
    fused = Fused(activation, gated, norm, residual)
    if takes_hopper(*products):
        from .gemv_hopper import multiply_hopper

        multiply_hopper(*products, fused=fused, follows=follows)
    else:
        _launch(*products, fused=fused, follows=follows, tile=tile)


def _in_line(tensor: Tensor | None) -> bool:
    """Whether the numbers of a vector, or of a residual's rows, are next to each other."""
    return tensor is None or tensor.stride(-1) == 1


def _copied_into_line(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or _in_line(tensor) else tensor.contiguous()


def filled_up(products: Sequence[Product]) -> list[Product]:
    """As many products as the kernels have arguments for, the last one in the place of absent ones."""
    return [*products, *[products[-1]] * (MAX_PRODUCTS - len(products))]


def _launch(*products: Product, fused: Fused, follows: bool, tile: Tile | None) -> None:
    """As :func:`multiply`, by the kernel here."""
    first, weights = products[0], [product.weight for product in products]
    rows, itemsize, target = first.x.shape[-2], first.x.element_size(), target_of(first.x.device)
    assert fused.norm is None or rows == 1
    align, period, edges = _alignment(weights)
    features, depth = sum(weight.shape[0] for weight in weights), max(weight.shape[1] for weight in weights)
    tile = tile or tile_of(target, rows, itemsize, features, depth, fused.gated, edges)
    blocks = [period * triton.cdiv(triton.cdiv(weight.shape[0], period), tile.block_f) for weight in weights]
    three = filled_up(products)
    # Several rows pass through shared memory, which a launch that waits for its turn would hold.
    overlapping = target.overlapping and rows == 1
    launch(
        gemv_kernel,
        (blocks[0] if fused.gated else sum(blocks), 1),
        *(tensor for product in three for tensor in _tensors(product)),
        *fused.arguments(absent=first.out),
        rows,
        blocks[0],
        blocks[min(1, len(blocks) - 1)],
        *(size for product in three for size in _sizes(product)),
        len(products),
        *(product.bias is not None for product in three),
        **fused.constants(),
        ROWS=1 if rows == 1 else MAX_ROWS,
        BLOCK_F=tile.block_f,
        BLOCK_K=tile.block_k,
        SPLIT=tile.split,
        ALIGN=align,
        PERIOD=period,
        EDGES=edges,
        SHIFTED=rows > 1 and align > 1 and all(product.x.dim() == 3 for product in products),
        COPIES=PERIOD if first.out.dim() == 3 else 1,
        TURN=None if not overlapping else "behind weights" if follows else "first",
        APPROXIMATE=itemsize == 2,
        HARDWARE_TANH=target.hardware_tanh,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        overlapping=overlapping,
    )


def _alignment(weights: Sequence[Tensor]) -> tuple[int, int, bool]:
    """How the kernel reads weights 16 bytes at a time.

    Returns:
        Elements that are read together; rows after which one is as far from a boundary as the first; and whether a
        row's first or last piece has elements that are not its own.
    """
    align = 16 // weights[0].element_size() if all(weight.data_ptr() % 16 == 0 for weight in weights) else 1
    period = 1 if all(weight.stride(0) % align == 0 for weight in weights) else PERIOD
    return align, period, period > 1 or any(weight.shape[1] % align for weight in weights)


def _tensors(product: Product) -> tuple[Tensor, ...]:
    """The kernel's tensors for one product; the result in the place of an absent bias."""
    x, weight, bias, out = product
    return x, weight, out if bias is None else bias, out


def _sizes(product: Product) -> tuple[int, ...]:
    """The kernel's numbers for one product."""
    x, weight, _, out = product
    copy_x, copy_out = (t.stride(0) if t.dim() == 3 else 0 for t in (x, out))
    return (*weight.shape, x.stride(-2), copy_x, weight.stride(0), out.stride(-2), copy_out)
