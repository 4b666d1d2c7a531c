"""Under autocast the operator's inputs are cast as autocast casts those of the layers it replaces."""

import pytest
import torch
from torch.nn import functional
from torch.nn.functional import linear, scaled_dot_product_attention

from .builder import rewritten, tensor

X = tensor(2, 6, 32)
MLP = tensor(4, 32), tensor(48, 4), tensor(48), tensor(5, 48), tensor(32, 5)
ATTENTION = tensor(4, 32), tensor(32, 4), tensor(6, 32), tensor(32, 6)


def mlp(x, d1, u1, b1, d2, u2):
    return linear(linear(functional.gelu(linear(linear(x, d1), u1, b1)), d2), u2)


def self_attention(x, qd, qu, out_down, out_up):
    q, k, v = (linear(linear(x, qd), qu).unflatten(-1, (4, 8)).transpose(1, 2) for _ in range(3))
    heads = scaled_dot_product_attention(q, k, v)
    return linear(linear(heads.transpose(1, 2).flatten(2), out_down), out_up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "function", "weights"), [("mlp", mlp, MLP), ("attention", self_attention, ATTENTION)])
def test_regions_match_and_compute_in_the_autocast_dtype(kind, function, weights, dtype):
    with torch.autocast("cpu", dtype):
        result = rewritten(function, X, *weights)
        assert result.count(kind) == 1, result.report
        result.assert_same_result()
        assert result.module(X, *weights).dtype == dtype


def test_inputs_already_narrow_are_not_cast_again():
    with torch.autocast("cpu", torch.bfloat16):
        result = rewritten(mlp, X.bfloat16(), *MLP)
    assert result.count("mlp") == 1
    assert "x.to(" not in result.code
    assert "d1.to(" in result.code
