"""``kernels.padding`` against the library."""

import pytest
import torch

from flashsvd_compile.kernels.padding import padded_copy
from tests.ops.regions import random


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (40, 13), (17, 257)])
@pytest.mark.parametrize("padding", [(0, 3), (5, 0), (2, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_copy_with_zeros_behind(shape, padding, layout):
    source = random(*shape, dtype=torch.float16, layout=layout)
    out = source.new_full((shape[0] + padding[0], shape[1] + padding[1]), torch.nan)
    assert torch.equal(padded_copy(source, out), torch.nn.functional.pad(source, (0, padding[1], 0, padding[0])))
