"""What all tests on a GPU begin with."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible_and_exact() -> Iterator[None]:
    """The same random numbers each time; and neither the reference nor the fused form may round float32 to tf32."""
    torch.manual_seed(0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
