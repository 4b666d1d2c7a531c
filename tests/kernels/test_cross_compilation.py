"""Every kernel configuration compiled for each architecture: no register may spill, no chip's memory be exceeded.

A configuration is what the tables give for the ranks, head sizes and dtypes below; where a table has none on a chip
(``supported`` says so), the operators take the library there, and there is nothing to compile.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsvd_compile.kernels import (
    attention,
    gating,
    gemv,
    mlp,
    padding,
    partial_sums,
    product,
    product_single,
    projection,
    rotary,
    short_attention,
    small_products,
)
from flashsvd_compile.kernels.operands import Product, RmsNorm, Rotation
from flashsvd_compile.kernels.short_attention import Factors
from flashsvd_compile.kernels.target import KNOWN, speaks_gluon
from flashsvd_compile.kernels.tiles import empty_with_aligned_rows
from flashsvd_compile.ops.activation import ACTIVATIONS

from .cross import GPUS, TENSOR_MEMORY, Usage, compiling_for, usage_of

HALF, SINGLE = torch.bfloat16, torch.float32
DEVICE = torch.device("cpu")
RANKS = (96, 192, 256, 304, 384)
HEADS = (40, 64, 80, 128, 256)
"""Those of tables, and one that is rounded up to each of the first two."""
WINDOWS = {"plain": (-1, -1), "causal": (-1, 0), "window": (128, 0)}


def matrix(rows: int, columns: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype)


def latent(rows: int, rank: int, dtype: torch.dtype = HALF) -> Tensor:
    return empty_with_aligned_rows(rows, rank, torch.empty(0, dtype=dtype))


def fused_mlp(rank: int, dtype: torch.dtype = HALF, activation: str = "gelu", bias: bool = True) -> None:
    if mlp.supported(rank, rank, dtype, DEVICE):
        vector = torch.empty(3072, dtype=dtype) if bias else None
        mlp.mlp_core(
            latent(4096, rank, dtype), matrix(3072, rank, dtype), vector, matrix(rank, 3072, dtype), activation
        )


def projections(*ranks: int, rows: int = 16384, dtype: torch.dtype = HALF) -> None:
    if projection.supported(list(ranks), dtype, DEVICE):
        bias = torch.empty(768, dtype=dtype)
        factors = [(matrix(rank, 768, dtype), matrix(768, rank, dtype)) for rank in ranks]
        maps = [projection.Map(down, None, up, bias, matrix(rows, 768, dtype)) for down, up in factors]
        projection.project(matrix(rows, 768, dtype), *maps, ahead=len(maps) > 1)  # as attention does


def attend(dim: int, window: str = "plain", padded: bool = False, dtype: torch.dtype = HALF, length: int = 512) -> None:
    if attention.supported(dim, dim, dtype, DEVICE):
        q, k, v, out = (torch.empty(2, length, 4, dim, dtype=dtype) for _ in range(4))
        mask = torch.ones(2, length, dtype=torch.bool) if padded else None
        bounds = None if mask is None else attention.key_bounds(mask)
        left, right = WINDOWS[window]
        how: dict[str, Any] = {"scale": 0.1, "window_left": left, "window_right": right}
        attention.attention(q, k, v, out, key_padding=mask, bounds=bounds, **how)


def attend_to_short(dim: int, rank: int, length: int = 128) -> None:
    if short_attention.supported(length, length, dim, (rank, rank), HALF, DEVICE):
        q, out = (torch.empty(2, length, 4, dim, dtype=HALF) for _ in range(2))
        bias = torch.empty(4 * dim, dtype=HALF)
        k, v = (Factors(latent(2 * length, rank), matrix(4 * dim, rank), bias) for _ in range(2))
        padding = torch.ones(2, length, dtype=torch.bool)
        how: dict[str, Any] = {"kv_heads": 4, "scale": 0.1, "window_left": -1, "window_right": -1}
        short_attention.short_attention(q, k, v, out, key_padding=padding, **how)


def multiply_few(rows: int, *depths: int, gated: bool = False, features: int = 4096, dtype: torch.dtype = HALF) -> None:
    bias = torch.empty(features, dtype=dtype)
    out = matrix(rows, features, dtype)
    shifted = rows > 1 and any(depth % gemv.PERIOD for depth in depths)  # as operators have them
    xs = [gemv.shifted_rows(rows, d, out) if shifted else matrix(rows, d, dtype) for d in depths]
    products = [Product(x, matrix(features, d, dtype), bias, out) for x, d in zip(xs, depths, strict=True)]
    gemv.multiply(*products, gated=gated, activation="silu" if gated else None, follows=True)


def multiply_beside(norm: bool, residual: bool, depth: int, rows: int = 1, dtype: torch.dtype = HALF) -> None:
    out, weight = matrix(rows, 4096, dtype), matrix(4096, depth, dtype)
    x = matrix(rows, depth, dtype)
    taken = RmsNorm(torch.empty(depth, dtype=dtype), 1e-6) if norm else None
    if taken is None or gemv.normalises(x, [weight], taken):
        gemv.multiply(
            Product(x, weight, None, out),
            norm=taken,
            residual=torch.empty_like(out) if residual else None,
        )


def add_up() -> None:
    partial_sums.add_up(latent(3 * 4096, 304).unflatten(0, (3, 4096)), torch.empty(304, dtype=HALF))


def multiply_together(depth: int, copies: bool, by_depth: bool = False) -> None:
    up, out, bias = matrix(768, depth), matrix(768, 768), torch.empty(768, dtype=HALF)
    down = matrix(768, depth) if by_depth else matrix(depth, 768).t()
    assert small_products.supported(*[(up, down)] * 3)
    small_products.multiply_together(*[small_products.Small(up, down, bias, out, bias if copies else None)] * 3)


def rotate(dtype: torch.dtype, interleaved: bool) -> None:
    cos, sin = (torch.empty(1, 512, 64, dtype=dtype) for _ in range(2))
    rotary.rotate_(torch.empty(2, 512, 4, 64, dtype=dtype), cos, sin, interleaved)


def multiply(form: str) -> None:
    if product.multiplies(gating.target_of(DEVICE), 4096, 4096):
        after(form, matrix(4096, 1024), matrix(4096, 1024), torch.empty(4096, dtype=HALF), matrix(4096, 4096))


def multiply_single(form: str, depth: int) -> None:
    if product_single.takes(gating.target_of(DEVICE), (4096, 1024)):
        out = matrix(4096, 1024, SINGLE)
        after(form, matrix(4096, depth, SINGLE), matrix(1024, depth, SINGLE), torch.empty(1024), out)


def multiply_pair(depth: int) -> None:
    products = [
        Product(matrix(4096, depth, SINGLE), matrix(1024, depth, SINGLE), bias, matrix(4096, 1024, SINGLE))
        for bias in (torch.empty(1024), None)
    ]
    if product.multiplies_pair_faster(*products):
        product_single.product_pair(*products)


def after(form: str, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """A product with what follows it."""
    activation = None if form in ("residual", "rotation") else "gelu" if x.dtype == SINGLE else "silu"
    table = matrix(64, 128)
    multiplied = Product(x, weight, bias, out)
    given: dict[str, dict[str, Any]] = {
        "gate": {"gate": out},
        "product": {"gate": multiplied},
        "residual": {"residual": out},
        "rotation": {"rotation": Rotation(table, table)},
    }
    product.multiply(multiplied, activation, **given.get(form, {}))


def configurations() -> Iterator[tuple[str, Callable[[], None]]]:
    """Names and calls; each compiles what the chip at hand has a configuration for."""
    for rank in RANKS:
        yield f"mlp {rank}", lambda rank=rank: fused_mlp(rank)
        yield f"projection {rank}", lambda rank=rank: projections(rank)
        yield f"projections {rank}", lambda rank=rank: projections(rank, rank)
        yield f"short attention {rank}", lambda rank=rank: attend_to_short(64, rank)
    yield "projections of few rows", lambda: projections(192, 192, rows=2048)
    yield "short attention of wide heads", lambda: attend_to_short(128, 192)
    yield "short attention of few keys", lambda: attend_to_short(64, 192, length=32)
    for activation in sorted(set(ACTIVATIONS) - {"gelu"}):
        yield f"mlp {activation}", lambda activation=activation: fused_mlp(96, activation=activation)
    yield "mlp without bias", lambda: fused_mlp(304, bias=False)
    yield "mlp float32", lambda: fused_mlp(96, SINGLE)
    yield "projection float32", lambda: projections(96, dtype=SINGLE)
    for dim in HEADS:
        yield f"attention {dim}", lambda dim=dim: attend(dim)
        yield f"attention {dim} float32", lambda dim=dim: attend(dim, dtype=SINGLE)
    for window in WINDOWS:
        yield f"attention {window} padded", lambda window=window: attend(64, window, padded=True)
    yield "attention 128 causal", lambda: attend(128, "causal")
    for padded in (False, True):  # on sm_90 in Gluon: as many keys as make its tiles come out even
        name = f"attention 64 of many keys{', padded' if padded else ''}"
        yield name, lambda padded=padded: attend(64, padded=padded, length=3072)
    for window in ("plain", "causal"):  # on sm_90 in Gluon
        yield f"attention 128 {window} of many keys", lambda window=window: attend(128, window, length=4096)
        name = f"attention 128 {window} of many keys, padded"
        yield name, lambda window=window: attend(128, window, padded=True, length=4096)
    for rows in (1, 8, 16):
        for depth in (1024, 1493, 4096):
            yield f"gemv {rows}x{depth}", lambda rows=rows, depth=depth: multiply_few(rows, depth, depth, depth)
        yield f"gated gemv {rows}", lambda rows=rows: multiply_few(rows, 1493, 1496, gated=True)
        yield f"gated gemv {rows} of an even rank", lambda rows=rows: multiply_few(rows, 1024, 1024, gated=True)
        yield f"gemv {rows} of few features", lambda rows=rows: multiply_few(rows, 11008, features=1024)
    for depth in (1024, 1493, 4096):
        yield f"gemv of a normalised row of {depth}", lambda depth=depth: multiply_beside(True, False, depth)
        yield f"gemv of {depth} beside a residual", lambda depth=depth: multiply_beside(False, True, depth)
    for rows in (8, 16):  # on sm_90 in Gluon
        yield f"gemv of {rows} normalised rows", lambda rows=rows: multiply_beside(True, True, 4096, rows)
    yield "gemv of a normalised row float32", lambda: multiply_beside(True, False, 1493, dtype=SINGLE)
    yield "gemv float32", lambda: multiply_few(1, 1493, dtype=SINGLE)
    yield "padding", lambda: drop(padding.padded_copy(matrix(500, 1493), matrix(500, 1496)))
    for depth in (384, 600, 333):
        yield f"products of factors of rank {depth}", lambda depth=depth: multiply_together(depth, copies=True)
    yield "small products", lambda: multiply_together(768, copies=False, by_depth=True)
    yield (
        "partial sums",
        lambda: drop(partial_sums.add_up(latent(3 * 4096, 304).unflatten(0, (3, 4096)), torch.empty(304))),
    )
    for form in ("alone", "gate", "product", "residual", "rotation"):  # on sm_90 in Gluon
        yield f"product {form}", lambda form=form: multiply(form)
    for form in ("alone", "gate", "residual"):
        for depth in (304, 305):
            name = f"product {form} of depth {depth} float32"
            yield name, lambda form=form, depth=depth: multiply_single(form, depth)
    for depth in (192, 768):
        yield f"two products of depth {depth} float32", lambda depth=depth: multiply_pair(depth)
    yield "gating", lambda: drop(gating.gate_("silu", matrix(512, 512), matrix(512, 512)))
    yield "rotation", lambda: rotate(HALF, False)
    yield "interleaved rotation float32", lambda: rotate(SINGLE, True)


def drop(_: object) -> None:
    """Ignore a result."""


CALLS = dict(configurations())
WITHOUT_FUSED_RANKS = {"sm_80": (304, 384), "sm_90": (), "sm_100": (), "gfx942": (304, 384)}
"""Ranks that the tables leave to the library."""


def fits(usage: Usage, chip: str) -> bool:
    """Whether a program runs on a chip without spilling."""
    within = usage.shared_memory <= KNOWN[chip].shared_memory and usage.tensor_memory <= TENSOR_MEMORY
    return within and usage.spills == 0


@pytest.mark.parametrize("chip", GPUS)
@pytest.mark.parametrize("name", CALLS)
def test_no_spills_and_no_more_memory_than_there_is(name, chip):
    with compiling_for(chip) as kernels:
        CALLS[name]()
    for kernel in kernels:
        usage = usage_of(kernel)
        assert fits(usage, chip), (kernel.metadata.name, usage)


@pytest.mark.parametrize("norm", [False, True])
def test_a_deep_tile_of_one_row_leaves_room_for_three_programs(norm):
    """Of 128 threads on a processor of 65536 registers; with room for two only, a launch took 11.6 us, not 7.4."""
    with compiling_for("sm_90") as kernels:
        multiply_beside(norm, False, 4096)
    ((usage,),) = [[usage_of(kernel) for kernel in kernels]]
    assert 3 * 128 * usage.registers <= 65536


@pytest.mark.parametrize("chip", GPUS)
def test_overlapping_launches_take_their_turn_where_chips_know_it(chip):
    with compiling_for(chip) as kernels:
        projections(96, 96, rows=2048)
        attend(64)
        multiply_few(1, 1024)
        if speaks_gluon(KNOWN[chip]):
            multiply_few(8, 1024)
    assert len(kernels) == 3 + speaks_gluon(KNOWN[chip])
    for kernel in kernels:
        assembly = kernel.asm["ptx" if "ptx" in kernel.asm else "amdgcn"]
        turns = [f"griddepcontrol.{name}" in assembly for name in ("wait", "launch_dependents")]
        assert all(turns) if KNOWN[chip].overlapping else not any(turns), kernel.metadata.name


@pytest.mark.parametrize("chip", GPUS)
def test_the_tables_have_what_is_compiled(chip):
    """So that nothing above passes for want of a configuration."""
    with compiling_for(chip) as kernels:
        for rank in RANKS:
            supported = mlp.supported(rank, rank, HALF, DEVICE), projection.supported([rank], HALF, DEVICE)
            assert supported == ((rank not in WITHOUT_FUSED_RANKS[chip]),) * 2, rank
        descriptors = KNOWN[chip].descriptors
        assert short_attention.supported(128, 128, 64, (192, 192), HALF, DEVICE) == descriptors
        assert attention.supported(128, 128, SINGLE, DEVICE) == (chip != "gfx942")
    assert not kernels


@pytest.mark.parametrize("chip", GPUS)
def test_a_configuration_that_is_too_large_is_found_out(chip):
    """A tile of accumulators that no chip has registers for, few enough to compile fast."""
    q, k, v, out = (torch.empty(1, 512, 1, 32, dtype=HALF) for _ in range(4))
    with compiling_for(chip) as kernels:
        how: dict[str, Any] = {"scale": 0.1, "window_left": -1, "window_right": -1}
        tile = attention.Tile(256, 64, 2, 2)
        attention.attention(q, k, v, out, key_padding=None, bounds=None, tile=tile, **how)
    assert not fits(usage_of(kernels[0]), chip)
