"""``kernels.small_products`` on the device, against float64."""

import pytest
import torch

from flashsvd_compile.kernels.small_products import TILES, Small, multiply_together
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import random

pytestmark = pytest.mark.gpu


def product(x, weight, bias):
    return torch.nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("tile", [None, *TILES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("shapes", [[(768, 480, 768)] * 3, [(1000, 333, 700), (50, 64, 700)], [(129, 1100, 65)]])
def test_each_product(shapes, copies, layout, dtype, tile):
    products = []
    for rows, depth, columns in shapes:
        x, weight = (random(*s, dtype=dtype, layout=layout).cuda() for s in ((rows, depth), (columns, depth)))
        bias = random(rows if copies else columns, dtype=dtype).cuda()
        out = x.new_full((rows, columns), torch.nan)
        products.append(Small(x, weight, bias, out, torch.full_like(bias, torch.nan) if copies else None))
    multiply_together(*products, tile=tile)
    for x, weight, bias, out, copy in products:
        assert_within_error_rule(out, product, (x, weight, None if copies else bias))
        assert copy is None or torch.equal(copy, bias)
