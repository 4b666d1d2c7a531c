"""``kernels.gating`` against its formula."""

import pytest
import torch
from torch import Tensor

from flashsvd_compile.kernels.gating import BLOCK, gate_
from flashsvd_compile.ops.activation import ACTIVATIONS
from tests.kernels.chips import INTERPRETED, running_on
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import random


def reference(gate: Tensor, hidden: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](gate) * hidden


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, BLOCK), (5, BLOCK // 4 + 1)])
def test_gate_times_hidden(shape, dtype, activation):
    gate, hidden = random(*shape, dtype=dtype, scale=3.0), random(*shape, dtype=dtype)
    with running_on(INTERPRETED["pointers"]):
        result = gate_(activation, gate.clone(), hidden)
    assert_within_error_rule(result, reference, (gate, hidden, activation), ulps=2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_no_number_stays_none(dtype, activation):
    """As in PyTorch, whose maximum of NaN and 0 is NaN; and infinities give what they give in its float64."""
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=dtype)
    hidden = torch.ones_like(gate)
    with running_on(INTERPRETED["pointers"]):
        result = gate_(activation, gate.clone(), hidden)
    torch.testing.assert_close(result, reference(gate.double(), hidden, activation).to(dtype), equal_nan=True)
