"""``kernels.small_products`` against the library."""

import pytest
import torch
from torch import Tensor

from flashsvd_compile.kernels.small_products import TILES, Small, multiply_together, supported
from tests.ops.regions import random

SHAPES = [(70, 33, 90), (64, 64, 64), (17, 130, 100)]
"""Rows, depth and columns."""


def product_of(shape: tuple[int, int, int], layout: str, has_bias: bool, copies: bool) -> Small:
    rows, depth, columns = shape
    x, weight = (random(*s, dtype=torch.float16, layout=layout) for s in ((rows, depth), (columns, depth)))
    bias = random(rows if copies else columns, dtype=torch.float16) if has_bias else None
    out = x.new_full((rows, columns + 6), torch.nan)[:, :columns]
    return Small(x, weight, bias, out, x.new_full((rows,), torch.nan) if copies else None)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("biases", [(True, True, True), (False, True, False), (False, False, False)])
@pytest.mark.parametrize("copies", [True, False])
def test_each_product(tile, layout, count, biases, copies):
    shapes = zip(SHAPES[:count], biases[:count], strict=True)
    products = [product_of(shape, layout, has_bias, copies) for shape, has_bias in shapes]
    assert supported(*[(product.x, product.weight) for product in products])
    multiply_together(*products, tile=tile)
    for x, weight, bias, out, copy in products:
        added = 0 if bias is None or copies else bias.double()
        expected = (x.double() @ weight.double().t() + added).half()
        torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
        if copy is not None:
            expected = torch.full_like(copy, torch.nan) if bias is None else bias
            torch.testing.assert_close(copy, expected, rtol=0, atol=0, equal_nan=True)


def test_what_is_left_to_the_library():
    def operands(rows: int, depth: int, columns: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
        return torch.zeros(rows, depth, dtype=dtype), torch.zeros(columns, depth, dtype=dtype)

    small = x, weight = operands(64, 33, 64)
    assert supported(small, small, small)
    assert not supported(small, small, small, small)
    assert not supported(small, operands(64, 1, 64))
    assert not supported(operands(64, 33, 64, torch.float32))
    assert not supported(small, (x, weight.t().contiguous().t()))  # of another layout
    assert not supported((x, torch.zeros(64, 66, dtype=torch.float16)[:, ::2]))
    assert not supported((x[:1].expand(64, 33), weight))
    assert not supported(operands(4096, 33, 4096))
