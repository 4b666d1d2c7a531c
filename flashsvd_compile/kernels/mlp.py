"""The fused core of a low-rank MLP: rank space to rank space, the hidden layer never leaves the chip.

    latent_out[n, :] = act(latent[n, :] @ up.T + bias) @ down.T

``latent = x @ hidden.down.T`` before and ``out.up`` after are ordinary products with a narrow side and stay with the
vendor's library. One program keeps a block of rows: its latent tile and its float32 result stay resident while the
hidden layer passes by, ``block_f`` columns at a time. Ranks are cut into up to three power-of-two pieces, so rank 192
costs 64 + 128 columns where padding would cost 256.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .autotune import about, tuned
from .launch import launch
from .target import Target, precision_of, speaks_gluon, target_of
from .tiles import (
    MAX_RANK,
    PIECE,
    Tile,
    empty_with_aligned_rows,
    load_tile,
    pieces,
    store_tile,
    tile_views,
    with_aligned_rows,
)

MAX_SPLITS = 8


def tiles_of(target: Target, rank_in: int, rank_out: int, itemsize: int) -> list[Tile]:
    """The configurations that fit the chip's shared memory, the fastest measured one first."""
    width_in, width_out = sum(pieces(rank_in)), sum(pieces(rank_out))

    def fits(tile: Tile) -> bool:
        resident = tile.block_n * width_in
        streamed = tile.num_stages * tile.block_f * (width_in + width_out)
        return (resident + streamed) * itemsize + _RESERVE <= target.shared_memory

    return list(filter(fits, _candidates(target, max(width_in, width_out), itemsize)))


_RESERVE = 4096  # barriers


def _candidates(target: Target, width: int, itemsize: int) -> list[Tile]:
    """Fastest first; none needs more registers than a thread has (``tests/kernels/test_cross_compilation.py``)."""
    if itemsize == 4:
        return _float32_candidates(target, width)
    if target.name in ("sm_90", "sm_100"):
        wide = [Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)]
        return [Tile(128, 64, 4, 3), *wide] if width <= 96 and target.name == "sm_90" else wide
    if width > 2 * PIECE:
        return []
    if width <= PIECE:
        return [Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)]
    if width <= 192 or target.name == "gfx942":
        return [Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 4, 1)]
    return [Tile(64, 16, 8, 2), Tile(32, 16, 8, 1)]


def _float32_candidates(target: Target, width: int) -> list[Tile]:
    """Without tensor cores a thread holds whole rows of its operands: long rows leave it few results."""
    if width > PIECE:
        return []
    if target.name == "gfx942" or (target.descriptors and width <= 32):
        return [Tile(32, 32, 4, 1)]
    if target.descriptors and width > 64:
        return [Tile(16, 16, 8, 1)]
    return [Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)]


SPECIALISED = Tile(128, 64, 12, 0)
"""The tile of the kernel in Gluon, whose stages fill what shared memory there is."""
SPECIALISED_RANKS = range(257, 321)
"""Ranks at which it is faster, by a fifth to a third (H100, 4096 to 65536 rows). Below them its steps are no longer
than those of the kernel here, and at most 320 columns of float32 fit in the registers of its threads."""


def is_specialised(target: Target, rank_in: int, rank_out: int, width: int, dtype: torch.dtype) -> bool:
    """Whether the kernel in Gluon takes these ranks.

    It reads the bias element by element where 16 does not divide the width, which spills two registers.
    """
    known = speaks_gluon(target) and dtype.itemsize == 2
    return known and width % 16 == 0 and max(rank_in, rank_out) in SPECIALISED_RANKS


@triton.jit
def mlp_core_kernel(
    latent_0, latent_1, latent_2, up_0, up_1, up_2, bias, down_0, down_1, down_2, out,
    rows, width, width_per_split, rank_in, rank_out,
    stride_latent, stride_up_f, stride_up_r, stride_down_r, stride_down_f, stride_out,
    I0: tl.constexpr, I1: tl.constexpr, I2: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    DESCRIPTOR: tl.constexpr, APPROXIMATE: tl.constexpr, HARDWARE_TANH: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Rows ``BLOCK_N * program_id(0) ..``, hidden columns ``width_per_split * program_id(1) ..``.

    latent is ``[rows, rank_in]``, up ``[width, rank_in]``, down ``[rank_out, width]``, out
    ``[splits * rows, rank_out]``: each split of the hidden layer leaves a partial sum. ``I0 .. I2`` and ``O0 .. O2``
    are the pieces of the two ranks; a matrix arrives once per piece because a descriptor carries its tile's shape.
    """
    n = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    out += split.to(tl.int64) * rows * stride_out
    f_start = split * width_per_split
    f_stop = tl.minimum(f_start + width_per_split, width)

    x0 = load_tile(latent_0, n, 0, rows, rank_in, stride_latent, 1, BLOCK_N, I0, DESCRIPTOR)
    if I1 > 0:
        x1 = load_tile(latent_1, n, I0, rows, rank_in, stride_latent, 1, BLOCK_N, I1, DESCRIPTOR)
    if I2 > 0:
        x2 = load_tile(latent_2, n, I0 + I1, rows, rank_in, stride_latent, 1, BLOCK_N, I2, DESCRIPTOR)
    acc0 = tl.zeros([BLOCK_N, O0], tl.float32)
    if O1 > 0:
        acc1 = tl.zeros([BLOCK_N, O1], tl.float32)
    if O2 > 0:
        acc2 = tl.zeros([BLOCK_N, O2], tl.float32)

    # Programs start at different columns: in step they would all wait for the same weights from device memory.
    steps = tl.cdiv(f_stop - f_start, BLOCK_F)
    shift = tl.program_id(0) % steps
    columns = tl.arange(0, BLOCK_F)
    f_next = f_start + shift * BLOCK_F
    if HAS_BIAS:
        bias_next = tl.load(bias + f_next + columns, mask=f_next + columns < width, other=0.0)
    for _ in tl.range(0, steps, num_stages=STAGES):
        f = f_next
        f_next = tl.where(f + BLOCK_F < f_stop, f + BLOCK_F, f_start)
        if HAS_BIAS:
            # One step ahead, in registers: a bias loaded where it is used stalls every step (16 % at rank 304).
            bias_here = bias_next
            bias_next = tl.load(bias + f_next + columns, mask=f_next + columns < width, other=0.0)
        u0 = load_tile(up_0, f, 0, width, rank_in, stride_up_f, stride_up_r, BLOCK_F, I0, DESCRIPTOR)
        hidden = tl.dot(x0, u0.T, input_precision=PRECISION)
        if I1 > 0:
            u1 = load_tile(up_1, f, I0, width, rank_in, stride_up_f, stride_up_r, BLOCK_F, I1, DESCRIPTOR)
            hidden = tl.dot(x1, u1.T, hidden, input_precision=PRECISION)
        if I2 > 0:
            u2 = load_tile(up_2, f, I0 + I1, width, rank_in, stride_up_f, stride_up_r, BLOCK_F, I2, DESCRIPTOR)
            hidden = tl.dot(x2, u2.T, hidden, input_precision=PRECISION)
        if HAS_BIAS:
            hidden += bias_here.to(tl.float32)[None, :]
        hidden = activate(hidden, ACTIVATION, APPROXIMATE, HARDWARE_TANH).to(x0.dtype)
        d0 = load_tile(down_0, 0, f, rank_out, width, stride_down_r, stride_down_f, O0, BLOCK_F, DESCRIPTOR)
        acc0 = tl.dot(hidden, d0.T, acc0, input_precision=PRECISION)
        if O1 > 0:
            d1 = load_tile(down_1, O0, f, rank_out, width, stride_down_r, stride_down_f, O1, BLOCK_F, DESCRIPTOR)
            acc1 = tl.dot(hidden, d1.T, acc1, input_precision=PRECISION)
        if O2 > 0:
            d2 = load_tile(down_2, O0 + O1, f, rank_out, width, stride_down_r, stride_down_f, O2, BLOCK_F, DESCRIPTOR)
            acc2 = tl.dot(hidden, d2.T, acc2, input_precision=PRECISION)

    store_tile(out, acc0, n, 0, rows, rank_out, stride_out, BLOCK_N, O0)
    if O1 > 0:
        store_tile(out, acc1, n, O0, rows, rank_out, stride_out, BLOCK_N, O1)
    if O2 > 0:
        store_tile(out, acc2, n, O0 + O1, rows, rank_out, stride_out, BLOCK_N, O2)


def supported(rank_in: int, rank_out: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a configuration for these ranks exists on this device."""
    if max(rank_in, rank_out) > MAX_RANK or min(rank_in, rank_out) < 1:
        return False
    return bool(tiles_of(target_of(device), rank_in, rank_out, dtype.itemsize))


def mlp_core(
    latent: Tensor,
    up: Tensor,
    bias: Tensor | None,
    down: Tensor,
    activation: str,
    max_splits: int = MAX_SPLITS,
    tile: Tile | None = None,
) -> Tensor:
    """``act(latent @ up.T + bias) @ down.T`` in parts, without its hidden layer in memory.

    Args:
        latent: ``[rows, rank_in]``, contiguous, at most :data:`MAX_RANK` columns.
        up: ``[width, rank_in]``, any strides.
        bias: ``[width]`` or ``None``.
        down: ``[rank_out, width]``, any strides.
        activation: a name of ``ops.activation.ACTIVATIONS``.
        max_splits: upper bound on the partial sums that few rows are spread over.
        tile: overrides the table.

    Returns:
        ``[splits, rows, rank_out]`` in the dtype of ``latent``, to be summed up; each is a sum in float32, rounded.
    """
    (rows, rank_in), (rank_out, width) = latent.shape, down.shape
    target = target_of(latent.device)
    if target.descriptors:
        latent, up, down = with_aligned_rows(latent), with_aligned_rows(up), with_aligned_rows(down)
    specialised = tile is None and is_specialised(target, rank_in, rank_out, width, latent.dtype)
    if specialised:
        tile = SPECIALISED
    tile = tile or _chosen_tile(target, latent, up, bias, down, activation, max_splits)
    width_per_split = _width_per_split(target, rows, width, tile, max_splits)
    splits = triton.cdiv(width, width_per_split)
    partial = empty_with_aligned_rows(splits * rows, rank_out, latent)
    if specialised:
        from .mlp_hopper import mlp_core_hopper

        mlp_core_hopper(latent, up, bias, down, activation, partial, width_per_split)
    else:
        _launch(latent, up, bias, down, activation, partial, width_per_split, tile)
    return partial.unflatten(0, (splits, rows))


def _width_per_split(target: Target, rows: int, width: int, tile: Tile, max_splits: int) -> int:
    """Columns of the hidden layer in each partial sum: whole tiles, and splits enough to fill the chip."""
    programs = triton.cdiv(rows, tile.block_n)
    splits = min(max_splits, max(1, target.processors // programs), triton.cdiv(width, tile.block_f))
    return triton.cdiv(triton.cdiv(width, splits), tile.block_f) * tile.block_f


def _launch(
    latent: Tensor,
    up: Tensor,
    bias: Tensor | None,
    down: Tensor,
    activation: str,
    partial: Tensor,
    width_per_split: int,
    tile: Tile,
) -> None:
    """Fill ``partial[splits * rows, rank_out]`` by the kernel here."""
    (rows, rank_in), (rank_out, width), target = latent.shape, down.shape, target_of(latent.device)
    inner, outer = pieces(rank_in), pieces(rank_out)
    launch(
        mlp_core_kernel,
        (triton.cdiv(rows, tile.block_n), triton.cdiv(width, width_per_split)),
        *tile_views(latent, [(tile.block_n, piece) for piece in inner], target.descriptors),
        *tile_views(up, [(tile.block_f, piece) for piece in inner], target.descriptors),
        latent if bias is None else bias.contiguous(),
        *tile_views(down, [(piece, tile.block_f) for piece in outer], target.descriptors),
        partial,
        rows,
        width,
        width_per_split,
        rank_in,
        rank_out,
        latent.stride(0),
        *up.stride(),
        *down.stride(),
        partial.stride(0),
        *inner,
        *outer,
        BLOCK_N=tile.block_n,
        BLOCK_F=tile.block_f,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        DESCRIPTOR=target.descriptors,
        APPROXIMATE=latent.dtype != torch.float32,
        HARDWARE_TANH=target.hardware_tanh,
        PRECISION=precision_of(latent.dtype),
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


def _chosen_tile(
    target: Target, latent: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, activation: str, max_splits: int
) -> Tile:
    (rows, rank_in), (rank_out, width) = latent.shape, down.shape
    tiles = tiles_of(target, rank_in, rank_out, latent.element_size())
    assert tiles, "ask supported() first"
    few = rows < target.processors * tiles[0].block_n  # splits of the hidden layer occupy the rest of the chip
    return tuned(
        "mlp_core",
        tiles,
        lambda tile: [mlp_core(latent, up, bias, down, activation, max_splits, tile).sum(0)],
        latent,
        rows=about(rows),
        rank_in=rank_in,
        width=width,
        rank_out=rank_out,
        activation=activation,
        bias=bias is not None,
        max_splits=about(min(max_splits, target.processors)) if few else 1,
        up_by_rows=up.stride(1) == 1,
        down_by_rows=down.stride(1) == 1,
    )
