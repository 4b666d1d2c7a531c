"""Attentions and MLPs add the residual of a model that normalises before them; other sums stay as they are."""

import operator
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import dropout, linear, relu, rms_norm, scaled_dot_product_attention

from flashsvd_compile import ops

from .builder import Rewritten, call, rewritten, tensor

X = tensor(2, 12, 32)
MLP = (tensor(4, 32), tensor(48, 4), tensor(5, 48), tensor(32, 5))
ATTENTION = (tensor(4, 32, seed=1), tensor(32, 4, seed=1), tensor(4, 32, seed=2), tensor(32, 4, seed=2))
aten = torch.ops.aten


def low_rank(x, down, up):
    return linear(linear(x, down), up)


def normed(x):
    return rms_norm(x, (32,))


def mlp(x, down1, up1, down2, up2):
    return low_rank(relu(low_rank(x, down1, up1)), down2, up2)


def attention(x, down, up, out_down, out_up):
    q, k, v = (low_rank(x, down, up).unflatten(-1, (-1, 8)).transpose(1, 2) for _ in range(3))
    return low_rank(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), out_down, out_up)


REGIONS = {"mlp": (mlp, MLP), "attention": (attention, ATTENTION)}


def absorbed(result: Rewritten) -> int:
    """Operator calls that add a residual."""
    calls = [node for node in result.module.graph.nodes if node.target in (ops.mlp, ops.attention)]
    assert calls, "the region itself is found"
    return sum("residual" in node.kwargs for node in calls)


SPELLINGS: dict[str, Callable] = {
    "y + r": lambda y, r: y + r,
    "r + y": lambda y, r: r + y,
    "torch.add": lambda y, r: torch.add(r, y),
    "keywords": lambda y, r: torch.add(input=y, other=r, alpha=1),
    "method": lambda y, r: y.add(r),
    "other method": lambda y, r: r.add(y, alpha=1),
    "exported": lambda y, r: aten.add.Tensor(r, y),
    "dropout off": lambda y, r: r + dropout(y, 0.1, False),
    "two dropouts off": lambda y, r: r + dropout(dropout(y, 0.1, training=False), 0.0),
    "strided": lambda y, r: y + r.mT.contiguous().mT,
    "made after the region": lambda y, r: y + (r + 1),
}


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_absorbed(spelling, region):
    compute, weights = REGIONS[region]
    result = rewritten(lambda x, a, b, c, d: SPELLINGS[spelling](compute(normed(x), a, b, c, d), x).sin(), X, *weights)
    assert absorbed(result) == 1
    assert not result.module.graph.find_nodes(op="call_function", target=dropout)
    assert result.count(region) == 1
    result.assert_same_result()


def test_every_sum_of_a_block():
    def block(x, a, b, c, d, e, f, g, h):
        x = x + attention(normed(x), a, b, c, d)
        return x + mlp(normed(x), e, f, g, h)

    result = rewritten(block, X, *ATTENTION, *MLP)
    assert absorbed(result) == 2
    assert not result.module.graph.find_nodes(op="call_function", target=operator.add)
    result.assert_same_result()


def test_parallel_branches():
    """The result of one is the residual of the other; the sum of both is left."""

    def block(x, a, b, c, d, e, f, g, h):
        both = normed(x)
        return attention(both, a, b, c, d) + mlp(both, e, f, g, h) + x

    result = rewritten(block, X, *ATTENTION, *MLP)
    assert absorbed(result) == 1
    result.assert_same_result()


def overwritten_residual(y, r):
    copied = r.clone()
    copied.mul_(2)
    return y + copied


LEFT: dict[str, Callable] = {
    "another user": lambda y, r: (y + r, y.sin()),
    "two sums": lambda y, r: (y + r) * (y + 1),
    "alpha": lambda y, r: torch.add(y, r, alpha=2),
    "difference": lambda y, r: y - r,
    "doubled": lambda y, r: y + y,
    "number": lambda y, r: y + 1.0,
    "broadcast residual": lambda y, r: y + r[:1],
    "broadcast result": lambda y, r: y + r[None],
    "wider": lambda y, r: y + r.double(),
    "narrower": lambda y, r: y + r.bfloat16(),
    "in place": lambda y, r: y.add_(r),
    "in-place operator": lambda y, r: call(operator.iadd, y, r),
    "into the residual": lambda y, r: r.clone().add_(y),
    "into a tensor": lambda y, r: torch.add(y, r, out=torch.empty_like(r)),
    "overwritten in between": overwritten_residual,
    "live dropout": lambda y, r: r + dropout(y, 0.5, True),
    "not a sum": lambda y, r: y.sin(),
    "returned": lambda y, r: y,
}


@pytest.mark.parametrize("spelling", LEFT)
def test_left_alone(spelling):
    result = rewritten(lambda x, a, b, c, d: LEFT[spelling](mlp(normed(x), a, b, c, d), x), X, *MLP)
    assert absorbed(result) == 0
    if spelling != "live dropout":
        result.assert_same_result()


def test_an_input_overwritten_before_the_sum():
    def function(x, a, b, c, d):
        h = normed(x)
        y = mlp(h, a, b, c, d)
        h.mul_(0)
        return y + x, h

    result = rewritten(function, X, *MLP)
    assert absorbed(result) == 0
    result.assert_same_result()


@pytest.mark.parametrize("region", REGIONS)
def test_the_input_itself_is_no_residual(region):
    """As in a model that normalises after the sum."""
    compute, weights = REGIONS[region]
    result = rewritten(lambda x, a, b, c, d: normed(x + compute(x, a, b, c, d)), X, *weights)
    assert absorbed(result) == 0
    result.assert_same_result()


@pytest.mark.parametrize(
    ("device", "rows", "dtype", "expected"),
    [
        ("cpu", 16, torch.float32, 0),
        ("cpu", 17, torch.float32, 1),
        ("cuda", 16, torch.bfloat16, 1),
        ("cuda", 16, torch.float32, 0),
        ("cuda", 1, torch.float32, 1),
    ],
)
def test_few_rows(device, rows, dtype, expected):
    """A GPU has a kernel that adds the residual in passing; a CPU would need one more pass."""

    def block(x, a, b, c, d):
        return x + mlp(normed(x), a, b, c, d)

    x, *weights = (value.to(dtype) for value in (tensor(rows, 32), *MLP))
    result = rewritten(block, x, *weights, device=device)
    assert absorbed(result) == expected
    if dtype == torch.float32:
        result.assert_same_result()


def test_few_rows_by_factors_that_the_kernel_does_not_read():
    """``x @ U @ V``, whose factors' rows are columns in memory."""

    def block(x, a, b, c, d):
        return x + relu(normed(x) @ a @ b) @ c @ d

    factors = [factor.t().contiguous() for factor in MLP]
    result = rewritten(block, tensor(1, 32), *factors, device="cuda")
    assert absorbed(result) == 0
    result.assert_same_result()


@pytest.mark.parametrize(
    ("rows", "dtype", "expected"),
    [(1, torch.float32, 1), (16, torch.bfloat16, 1), (16, torch.float32, 0), (17, torch.float32, 0)],
)
def test_lone_projections_of_few_rows_on_a_gpu(rows, dtype, expected):
    """As behind attention that reads a cache."""
    inputs = (tensor(rows, 32, seed=1), tensor(rows, 32, seed=2), *ATTENTION[:2])
    inputs = [value.to(dtype) for value in inputs]
    result = rewritten(lambda x, y, a, b: x + low_rank(y, a, b), *inputs, device="cuda")
    calls = [node for node in result.module.graph.nodes if node.target is ops.packed_linear]
    assert [call.kwargs["residual"].name for call in calls] == ["x"] * expected
    assert len(result.module.graph.find_nodes(op="call_function", target=ops.linear)) == 1 - expected
    assert len(result.module.graph.find_nodes(op="call_function", target=operator.add)) == 1 - expected
    result.assert_same_result()


def test_disabled():
    result = rewritten(lambda x, a, b, c, d: x + mlp(normed(x), a, b, c, d), X, *MLP, disable=["residual"])
    assert absorbed(result) == 0


def test_a_sum_of_other_strides_stays():
    """It is laid out like the residual, as in models that have the sequence first."""

    def block(x, a, b, c, d):
        r = x.transpose(0, 1)
        return (r + mlp(normed(r), a, b, c, d)).transpose(0, 1).view(-1, 32)

    result = rewritten(block, X, *MLP)
    assert absorbed(result) == 0
    result.assert_same_result()
