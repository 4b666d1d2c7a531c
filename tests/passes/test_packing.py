"""Low-rank projections that read the same few rows become one call."""

import torch
from torch.nn.functional import linear

from flashsvd_compile import ops

from .builder import Rewritten, rewritten, tensor

X = tensor(2, 3, 32)


def pair(seed: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tensor(4, 32, seed=seed), tensor(features, 4, seed=seed + 1)


FACTORS = (*pair(1, 24), *pair(3, 16), *pair(5, 16))
TWO = FACTORS[:4]


def project(x, down, up):
    return linear(linear(x, down), up)


def calls(result: Rewritten) -> tuple[int, int]:
    """Packed calls and calls of one projection."""
    targets = [node.target for node in result.module.graph.nodes]
    return targets.count(ops.packed_linear), targets.count(ops.linear)


def three(x, a, b, c, d, e, f):
    """The first is used before the last exists."""
    first = project(x, a, b).view(2, 3, 4, 6).sin()
    return first, project(x, c, d), project(x, e, f)


def test_projections_of_one_input_are_packed():
    result = rewritten(three, X, *FACTORS)
    assert calls(result) == (1, 0)
    assert result.count("linear") == 3
    result.assert_same_result()


def test_a_fourth_stays_alone():
    def function(x, a, b, c, d, e, f):
        return (*three(x, a, b, c, d, e, f), project(x, c, d).relu())

    result = rewritten(function, X, *FACTORS)
    assert calls(result) == (1, 1)
    result.assert_same_result()


def test_factors_computed_in_between_are_computed_before():
    def function(x, a, b, c, d):
        first = project(x, a, b).relu()
        return first, (x @ (c * 2).t()) @ d.t()

    result = rewritten(function, X, *TWO)
    assert calls(result) == (1, 0)
    result.assert_same_result()


def test_many_rows_are_not_packed():
    def function(x, a, b, c, d):
        return project(x, a, b), project(x, c, d)

    assert calls(rewritten(function, tensor(16, 32), *TWO)) == (1, 0)
    assert calls(rewritten(function, tensor(17, 32), *TWO)) == (0, 2)


def test_other_inputs_are_not_packed():
    def function(x, a, b, c, d):
        return project(x, a, b), project(x + 1, c, d)

    assert calls(rewritten(function, X, *TWO)) == (0, 2)


def test_an_input_overwritten_in_between_is_not_packed():
    def function(x, a, b, c, d):
        y = x + 1
        first = project(y, a, b)
        y.view(-1).mul_(2)
        return first, project(y, c, d)

    result = rewritten(function, X, *TWO)
    assert calls(result) == (0, 2)
    result.assert_same_result()


def test_a_projection_of_another_one_is_not_packed_with_it():
    def function(x, a, b, c, d, e, f):
        y = project(x, a, b)
        return project(y, c, d), project(x, e, f)

    result = rewritten(function, X, *pair(1, 32), *FACTORS[2:])
    assert calls(result) == (1, 1)
    result.assert_same_result()


def test_a_factor_computed_from_a_projection_is_not_packed_with_it():
    def function(x, a, b, c, d):
        first = project(x, a, b)
        return first, project(x, c * first.mean(), d)

    result = rewritten(function, X, *TWO)
    assert calls(result) == (0, 2)
    result.assert_same_result()


def test_packing_can_be_disabled():
    assert calls(rewritten(three, X, *FACTORS, disable=["packing"])) == (0, 3)


def test_a_result_of_one_row_can_be_changed_in_place():
    """A part of one row is contiguous as it is: a view, which autograd lets nobody change."""
    first, second = (torch.nn.Sequential(torch.nn.Linear(32, 8, False), torch.nn.Linear(8, 48)) for _ in range(2))

    def function(x):
        a, b = first(x), second(x)
        return a.relu_() + b

    x = torch.randn(1, 32)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="flashsvd", options={"strategy": "streamed", "inner": "aot_eager"})
    result = compiled(x)
    torch.testing.assert_close(result, function(x))
    result.sum().backward()
    assert first[0].weight.grad is not None
