"""The streamed MLP of a GPU, its loops run on a CPU."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsvd_compile.kernels.operands import Product
from flashsvd_compile.kernels.target import KNOWN
from flashsvd_compile.ops import mlp_gpu, mlp_tiles, workspace
from flashsvd_compile.ops.activation import activation_of
from flashsvd_compile.ops.mlp_region import Mlp
from flashsvd_compile.ops.projection import group
from flashsvd_compile.ops.ranges import ranges

from .accuracy import assert_within_error_rule
from .regions import mlp_arguments

reference, RESIDUAL = (getattr(import_module("flashsvd_compile.ops.mlp"), name) for name in ("reference", "RESIDUAL"))


def mlp_of(arguments: tuple) -> Mlp:
    """The region of an operator's arguments."""
    hidden, gate, out = group(arguments[1:13])
    assert hidden is not None and out is not None
    return Mlp(hidden, gate, out, activation=arguments[19])


def linear(product: Product) -> Tensor:
    """Of copies: with half precision a CPU may read beyond a row of operands that are a slice of wider ones."""
    return torch.nn.functional.linear(product.x.clone(), product.weight.clone(), product.bias)


@pytest.fixture(params=[False, True], ids=["activated apart", "activated at once"])
def on_cpu(request, monkeypatch):
    """What a CPU lacks: a product of half precision with a float32 result, kernels, and a chip to cut tiles for.

    A list of what activated products were gated by.
    """
    gates = []

    def add_product(total: Tensor, x: Tensor, weight: Tensor, first: bool) -> None:
        product = x.float() @ weight.t().float()
        total.copy_(product if first else total + product)

    def padded_copy(source: Tensor, out: Tensor) -> Tensor:
        padding = [size for dim in (1, 0) for size in (0, out.shape[dim] - source.shape[dim])]
        return out.copy_(torch.nn.functional.pad(source, padding))

    def multiply(product: Product, activation=None, gate=None, residual=None) -> Tensor:
        if activation is not None:
            gates.append(gate)
        result = linear(product)
        result = torch.nn.functional.pad(result, (0, product.out.shape[1] - result.shape[1]))
        result = result if activation is None else activation_of(activation)(result)
        gate = linear(gate) if isinstance(gate, Product) else gate
        result = result if gate is None else result * gate
        return product.out.copy_(result if residual is None else result + residual)

    monkeypatch.setattr(workspace, "takes", lambda product, *beside: request.param)
    monkeypatch.setattr(workspace, "multiply", multiply)
    monkeypatch.setattr(mlp_tiles, "multiplies", lambda *size: request.param)
    monkeypatch.setattr(mlp_gpu, "multiply", multiply)
    monkeypatch.setattr(mlp_gpu, "_add_product", add_product)
    monkeypatch.setattr(mlp_gpu, "padded_copy", padded_copy)
    monkeypatch.setattr(mlp_gpu, "target_of", lambda device: KNOWN["sm_90"]._replace(processors=4))
    return gates


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ranks", [(37, 35, 41), (40, 16, 24), (40, 33, 24)])
@pytest.mark.parametrize("workspace_bytes", [1 << 14, 1 << 18, 1 << 24])
@pytest.mark.parametrize("down_bias", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_result(gated, ranks, workspace_bytes, down_bias, added, on_cpu):
    """A hidden layer whose rows begin at half sectors, so that no copies are kept."""
    shape: dict[str, Any] = {"width": 600, "out_features": 144, "gated": gated, "down_bias": down_bias}
    arguments = mlp_arguments(2, 301, 96, ranks=ranks, dtype=torch.bfloat16, workspace_bytes=workspace_bytes, **shape)
    x, mlp = arguments[0], mlp_of(arguments)
    residual = torch.randn(2, 301, 144).to(x.dtype) if added else None
    given = (*arguments[:RESIDUAL], residual, *arguments[RESIDUAL + 1 :])
    assert mlp_gpu.supported(x, mlp)
    result = mlp_gpu.streamed(x, mlp, workspace_bytes, residual=residual)
    assert_within_error_rule(result, reference, given)
    both_copied = ranks[0] % 16 and ranks[1] % 16
    expected = type(None) if not gated else Tensor if both_copied else Product
    assert all(isinstance(gate, expected) for gate in on_cpu)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ranks", [(37, 35, 41), (32, 16, 24), (40, 32, 48), (40, 33, 144)])
@pytest.mark.parametrize("rows", [602, 128, 1000])
@pytest.mark.parametrize("down_bias", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("on_cpu", [True], indirect=True)
def test_result_with_copies_kept(gated, ranks, rows, down_bias, added, on_cpu, monkeypatch):
    shape: dict[str, Any] = {"width": 608, "out_features": 144, "gated": gated, "down_bias": down_bias}
    arguments = mlp_arguments(1, rows, 96, ranks=ranks, dtype=torch.bfloat16, **shape)
    x, mlp = arguments[0], mlp_of(arguments)
    residual = torch.randn(1, rows, 144).to(x.dtype) if added else None
    tiles = mlp_tiles.Sizes.of(mlp).keeping_copies(rows, 2**19)
    assert tiles
    for tile in tiles:
        monkeypatch.setattr(mlp_gpu, "tile_of", lambda *given, tile=tile: tile)
        result = mlp_gpu.streamed(x, mlp, 2**20, residual=residual)
        given = (*arguments[:RESIDUAL], residual, *arguments[RESIDUAL + 1 :])
        assert_within_error_rule(result, reference, given)
    assert all(isinstance(gate, Product if gated else type(None)) for gate in on_cpu)


@pytest.mark.parametrize("rows", [1, 127, 128, 1000, 8192])
@pytest.mark.parametrize("most", [128, 384, 2816, 8192])
def test_even_ranges(rows, most):
    cut = mlp_tiles.even_ranges(rows, most)
    assert [i for some in cut for i in range(some.start, some.stop)] == list(range(rows))
    sizes = [mlp_tiles.width_of(some) for some in cut]
    assert min(sizes) > 0 and max(sizes) <= most
    blocks = [-(-size // mlp_tiles.BLOCK) for size in sizes]
    assert max(blocks) - min(blocks) <= 1


def kept(rank: int, width: int = 2816, out_features: int = 1024) -> list[mlp_tiles.HiddenTile]:
    shape: dict[str, Any] = {"width": width, "out_features": out_features, "gated": True, "dtype": torch.bfloat16}
    mlp = mlp_of(mlp_arguments(1, 1, 1024, ranks=(rank, rank, rank), **shape))
    return mlp_tiles.Sizes.of(mlp).keeping_copies(4096, 2**23)


@pytest.mark.parametrize("mebibytes", [14, 15, 16, 24, 48])
def test_tiles_that_keep_copies_stay_within_the_workspace(mebibytes):
    """Copies of 2 x 2816 x 512 elements take 5.5 MiB, of the last factor 1, 128 rows of the hidden layer 0.7."""
    mlp = mlp_of(mlp_arguments(1, 1, 1024, ranks=(501, 501, 501), width=2816, out_features=1024, gated=True))
    tiles = mlp_tiles.Sizes.of(mlp).keeping_copies(4096, mebibytes * 2**19)
    assert tiles
    assert all(tile.elements <= mebibytes * 2**19 for tile in tiles)
    assert all(tile.copied == 2 * 2816 * 512 for tile in tiles)


def test_where_copies_are_kept():
    assert kept(501)
    assert not kept(512), "nothing is copied"
    assert not kept(501, width=2824), "rows of the hidden layer, and of the factor behind it, at half sectors"
    assert not kept(501, out_features=496), "no room for the rank space behind the hidden layer"
    assert not kept(501, width=560, out_features=8192), "no room for the last factor where hidden layers were"


def test_chunks_are_of_one_size_where_that_is_fastest():
    sizes = mlp_tiles.Sizes(width=5632, features=2048, rank=1024, ranks=(1024, 1024), odd=False)
    tile = mlp_tiles._tile_of(sizes, 4096, int(1.44 * 4096 * 2048), 132, activated=True)
    assert (tile.rows, tile.columns) == (1408, 5632), "2048 rows by 3584 columns are 7 % slower"


@pytest.mark.parametrize("rank", [1024, 1493])
@pytest.mark.parametrize("rows", [2048, 16384])
@pytest.mark.parametrize("mebibytes", [48, 64, 128])
def test_tile_stays_within_the_workspace(rank, rows, mebibytes):
    arguments = mlp_arguments(1, 1, 4096, width=11008, out_features=4096, ranks=(rank,) * 3, gated=True)
    tile = mlp_tiles.tile_of(mlp_of(arguments), rows, mebibytes * 2**19, KNOWN["sm_90"])
    assert tile.elements <= mebibytes * 2**19
    assert 0 < tile.rows <= rows
    assert 0 < tile.columns <= 11008 + 128


@pytest.mark.parametrize(
    ("rank", "rows", "mebibytes"), [(1024, 128, 1), (1493, 128, 4), (1493, 512, 6), (1493, 2048, 6)]
)
def test_small_tile_stays_within_the_workspace(rank, rows, mebibytes):
    """Where the fastest tile of all would need more."""
    arguments = mlp_arguments(1, 1, 4096, width=11008, out_features=4096, ranks=(rank,) * 3, gated=True)
    tile = mlp_tiles.tile_of(mlp_of(arguments), rows, mebibytes * 2**19, KNOWN["sm_90"])
    assert tile.elements <= mebibytes * 2**19


def rounds(rows: int, columns: int) -> int:
    """In which the 132 processors of an H100 compute tiles of 128 x 256."""
    return -(-(-(-rows // 128) * -(-columns // 256)) // 132)


@pytest.mark.parametrize(
    ("rank", "rows", "mebibytes", "best"),
    [(1024, 16384, 64, (2688, 11008)), (1493, 8192, 124, (2816, 11008)), (1493, 4096, 60, (4096, 3072))],
)
def test_chunks_leave_few_processors_idle(rank, rows, mebibytes, best, monkeypatch):
    """2688 rows are 6.8 rounds of the chip, and no sums are read again: 3 % faster than two ranges of 4096 rows."""
    monkeypatch.setattr(mlp_tiles, "multiplies", lambda *size: True)
    arguments = mlp_arguments(1, 1, 4096, width=11008, out_features=4096, ranks=(rank,) * 3, gated=True)
    tile = mlp_tiles.tile_of(mlp_of(arguments), rows, mebibytes * 2**19, KNOWN["sm_90"])
    assert (tile.rows, tile.columns) == best
    cut = [min(tile.columns, 11008 - first) for first in range(0, 11008, tile.columns)]
    of_rows = mlp_tiles.even_ranges if tile.kept else ranges
    chunks = [mlp_tiles.width_of(some) for some in of_rows(rows, tile.rows)]
    needed = sum(rounds(chunk, columns) for chunk in chunks for columns in cut)
    least = -(-rows // 128) * -(-11008 // 256) / 132
    assert needed < 1.15 * least, "of the rounds that an undivided product would take"


def test_factors_that_are_copied_are_cut_evenly():
    arguments = mlp_arguments(1, 1, 4096, width=11008, out_features=4096, ranks=(1493, 1493, 1493), gated=True)
    sizes = mlp_tiles.Sizes.of(mlp_of(arguments))
    lifted = {columns: sizes.lifted_at_once(columns) for columns in (1024, 1280, 3072, 4096, 11008)}
    assert lifted == {1024: 1024, 1280: 1024, 3072: 2048, 4096: 4096, 11008: 4096}
