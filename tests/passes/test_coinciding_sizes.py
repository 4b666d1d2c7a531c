"""Programs that only look like what a reader knows, in sizes that happen to agree, and readers' odd ends."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from flashsvd_compile.measure import relative_error

from .builder import tensor

RANK = 2


def turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def attention(
    heads: int, changed: Callable[..., Tensor] = lambda x, *_: x, core: Callable[..., Tensor] | None = None
) -> Callable[..., Tensor]:
    """Self-attention whose queries and keys are changed by a function of them and of a table."""

    def function(x, table, *factors):
        batch, length, features = x.shape
        pairs = list(zip(factors[::2], factors[1::2], strict=True))
        lifted = (linear(linear(x, down), up) for down, up in pairs[:3])
        q, k, v = (each.view(batch, length, heads, features // heads).transpose(1, 2) for each in lifted)
        q, k = changed(q, table), changed(k, table)
        y = scaled_dot_product_attention(q, k, v) if core is None else core(q, k, v, table)
        return linear(linear(y.transpose(1, 2).reshape(batch, length, features), pairs[3][0]), pairs[3][1])

    return function


def by_parts(x: Tensor, table: Tensor) -> Tensor:
    cos, sin = table.unbind(-1)
    return x * torch.cat((cos, cos), -1) + turned(x) * torch.cat((sin, sin), -1)


def repeated(x: Tensor, table: Tensor) -> Tensor:
    cos, sin = (table[..., part].repeat_interleave(2, -1) for part in (0, 1))
    return x * cos + turned(x) * sin


def viewed(x: Tensor, table: Tensor) -> Tensor:
    cos, sin = (table[..., part].view(1, 5, -1) for part in (0, 1))
    return x * torch.cat((cos, cos), -1) + turned(x) * torch.cat((sin, sin), -1)


def of_a_larger_table(x: Tensor, table: Tensor) -> Tensor:
    return x * table[..., 0] + turned(x) * table[..., 1]


def of_rows_elsewhere(x: Tensor, table: Tensor) -> Tensor:
    """A root mean square of each position, by which features are divided."""
    return x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6)


def with_a_largest(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return (q @ k.mT + torch.max(table, 0)[0]).softmax(-1) @ v


def hidden_in_some_rows(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(table > 0, -float("inf"))
    return scores.clamp(min=-float("inf")).softmax(-1) @ v


def assert_same(model: Callable[..., Tensor], *inputs: Any) -> None:
    """The result is the model's, of what is rewritten of it and of what is not."""
    torch._dynamo.reset()
    fast = torch.compile(model, backend="flashsvd", options={"strategy": "streamed", "inner": "eager"})
    with torch.no_grad():
        result, expected = fast(*inputs), model(*inputs)
    assert torch.equal(result.isnan(), expected.isnan())
    assert relative_error(result.nan_to_num(), expected.nan_to_num()) < 1e-6


CASES = {
    "tables without their last dimension": (attention(4, by_parts), (2, 5, 16), (1, 5, 2, 2)),
    "the same, repeated": (attention(4, repeated), (2, 5, 16), (1, 5, 2, 2)),
    "the same, viewed": (attention(4, viewed), (2, 5, 16), (1, 5, 2, 2)),
    "as many columns as positions": (attention(4, of_a_larger_table), (3, 2, 8), (1, 1, 2, 2)),
    "a mean that keeps no dimension": (attention(4, of_rows_elsewhere), (4, 4, 16), ()),
    "the largest of one number": (attention(4, core=with_a_largest), (2, 5, 16), ()),
    "a floor of minus infinity": (attention(4, core=hidden_in_some_rows), (2, 5, 16), (5, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_results_are_those_of_the_model(case):
    function, shape, of_table = CASES[case]
    features = shape[-1]
    factors = [tensor(*size, seed=i) for i, size in enumerate([(RANK, features), (features, RANK)] * 4)]
    table = tensor(*of_table, seed=20) if of_table else torch.tensor(0.3)
    table = torch.ones(5, 5).tril() if case == "a floor of minus infinity" else table
    assert_same(function, tensor(*shape, seed=21), table, *factors)


class FactorsOfEachHead(nn.Module):
    def __init__(self, heads: int = 4, features: int = 16, dim: int = 4):
        super().__init__()
        make = lambda *shape: nn.ParameterList(nn.Parameter(0.3 * torch.randn(shape)) for _ in range(3))  # noqa: E731
        self.down, self.up, self.bias = make(heads, features, 3), make(heads, 3, dim), make(heads, 1, dim)

    def forward(self, x: Tensor, alpha: int) -> Tensor:
        parts = zip(self.down, self.up, self.bias, strict=True)
        q, k, v = (torch.add(x.unsqueeze(1) @ down @ up, bias, alpha=alpha) for down, up, bias in parts)
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("alpha", [1, 2])
def test_a_bias_of_each_head_that_is_scaled(alpha):
    torch.manual_seed(0)
    assert_same(FactorsOfEachHead(), torch.randn(2, 5, 16), alpha)
