"""Activations in place are those of eager execution, up to the ends of a dtype."""

import pytest
import torch

from flashsvd_compile.ops.activation import ACTIVATIONS, activate_, activation_of, gate_

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """``[40, 8]``: zero, infinities, NaN and a range of sizes, up to the largest of float16 and half that of others."""
    largest = torch.finfo(dtype).max / (1 if dtype == torch.float16 else 2)
    sizes = torch.logspace(-20, 0, 157, base=2, dtype=torch.float64) * largest
    ends = torch.tensor([0.0, float("inf"), float("nan")], dtype=torch.float64)
    return torch.cat([sizes, -sizes, *(sign * ends for sign in (1, -1))]).to(dtype)[:320].view(40, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_in_place(name, dtype):
    for x in (numbers(dtype), torch.randn(33, 7, dtype=dtype) * 4, numbers(dtype)[:1], numbers(dtype)[:0]):
        expected = activation_of(name)(x)
        result = activate_(name, x)
        assert result is x
        torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.parametrize("name", ["silu", "gelu", "quick_gelu"])
def test_gate(name):
    gate, hidden = torch.randn(33, 7), torch.randn(33, 7)
    expected = activation_of(name)(gate) * hidden
    torch.testing.assert_close(gate_(name, gate, hidden), expected)
