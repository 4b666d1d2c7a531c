"""``kernels.rotary`` against the rotation of the reference."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashsvd_compile.kernels.rotary import BLOCK_ELEMENTS, rotate_
from flashsvd_compile.ops.attention_region import rotate
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import laid_out, random, rotation


def reference(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    how: Any = SimpleNamespace(cos=cos, sin=sin, interleaved=interleaved)
    return rotate(heads.transpose(1, 2), how).transpose(1, 2).contiguous()


def assert_right(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    rotated = rotate_(heads.clone(memory_format=torch.preserve_format), cos, sin, interleaved).contiguous()
    assert_within_error_rule(rotated, reference, (heads, cos, sin, interleaved))


@given(
    items=st.integers(1, 3),
    length=st.integers(1, 40),
    heads=st.integers(1, 4),
    half=st.integers(1, 20),
    passed=st.integers(0, 9),
    table_per_item=st.booleans(),
    interleaved=st.booleans(),
    dtype=st.sampled_from((torch.float16, torch.float32)),
    table_dtype=st.sampled_from((None, torch.float32)),
)
def test_any_shape(items, length, heads, half, passed, table_per_item, interleaved, dtype, table_dtype):
    """``passed`` features of each head are not rotated."""
    x = random(items, length, heads, 2 * half + passed, dtype=dtype)
    cos, sin = rotation(items if table_per_item else 1, length, 2 * half, table_dtype or dtype)
    assert_right(x, cos, sin, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_several_blocks_of_positions(interleaved):
    length = BLOCK_ELEMENTS // 32 + 5
    cos, sin = rotation(1, length, 64, torch.float32)
    assert_right(random(1, length, 2, 64, dtype=torch.float32), cos, sin, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_strided_tables(layout, interleaved):
    cos, sin = (laid_out(table, layout) for table in rotation(2, 12, 16, torch.float32))
    assert_right(random(2, 12, 2, 16, dtype=torch.float32), cos, sin, interleaved)


def test_some_heads_of_a_wider_tensor():
    x = random(2, 9, 5, 16, dtype=torch.float32)
    before = x.clone()
    cos, sin = rotation(2, 9, 16, torch.float32)
    some = x[:, :, 1:3]
    expected = reference(some, cos, sin, False)
    rotate_(some, cos, sin, False)
    torch.testing.assert_close(some, expected)
    assert torch.equal(x[:, :, [0, 3, 4]], before[:, :, [0, 3, 4]])
