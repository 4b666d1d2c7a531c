"""``kernels.partial_sums`` against the library."""

import pytest
import torch

from flashsvd_compile.kernels.partial_sums import add_up
from flashsvd_compile.kernels.tiles import empty_with_aligned_rows
from tests.ops.regions import random


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (40, 13), (17, 257)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sum(parts, shape, bias, dtype):
    rows, columns = shape
    given = empty_with_aligned_rows(parts * rows, columns, torch.empty(0, dtype=dtype)).unflatten(0, (parts, rows))
    given.copy_(random(parts, rows, columns, dtype=dtype))
    added = random(columns, dtype=dtype) if bias else None
    exact = given.double().sum(0) + (0 if added is None else added.double())
    result = add_up(given, added)
    error = (result.double() - exact).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max()
