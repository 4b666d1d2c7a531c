"""``linear_v1`` and ``packed_linear_v2`` compute what they specify, whatever the shape, rank, dtype and workspace."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashsvd_compile import ops
from flashsvd_compile.errors import ShapeError
from flashsvd_compile.ops.linear import reference
from flashsvd_compile.ops.packed_linear import reference as packed_reference

from .accuracy import assert_within_error_rule, in_float64
from .regions import LAYOUTS, NO_NORM, linear_arguments, norm, packed_linear_arguments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    features=st.integers(1, 33),
    out_features=st.integers(1, 33),
    rank=st.none() | st.integers(1, 19),
    bias=st.booleans(),
    down_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    strategy=st.sampled_from(("streamed", "merged")),
    workspace_bytes=st.integers(1, 500),
)
def test_equals_reference(shape, features, out_features, rank, **how):
    """Multiplied factors are another order of summation, which differs the more the more its terms cancel."""
    arguments = linear_arguments(*shape, features, out_features=out_features, rank=rank, **how)
    ulps = 8 * cancellation(arguments) if how["strategy"] == "merged" else 8
    assert_within_error_rule(ops.linear(*arguments), reference, arguments, ulps=ulps)


def cancellation(arguments: tuple) -> float:
    """Norm of the sums of the terms' magnitudes over that of the sums: what rounding a term by an ulp may come to."""
    exact = in_float64(arguments)
    magnitudes = tuple(a.abs() if isinstance(a, torch.Tensor) else a for a in exact)
    sums = reference(*exact).norm()
    return float(reference(*magnitudes).norm() / sums) if sums > 0 else 1.0


@pytest.mark.parametrize("workspace_bytes", [1, 20, 40, 60, 100, 10_000])
def test_every_chunk_boundary(workspace_bytes):
    arguments = linear_arguments(11, 16, rank=5, workspace_bytes=workspace_bytes)
    assert_within_error_rule(ops.linear(*arguments), reference, arguments)


def test_a_vector_is_a_row():
    arguments = linear_arguments(16)
    assert ops.linear(*arguments).shape == (24,)
    assert_within_error_rule(ops.linear(*arguments), reference, arguments)


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    features=st.integers(1, 33),
    ranks=st.lists(st.none() | st.integers(1, 19), min_size=1, max_size=3),
    bias=st.booleans(),
    down_bias=st.booleans(),
    residual=st.booleans(),
    kind=st.sampled_from(("none", "rms", "layer")),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    workspace_bytes=st.integers(1, 500),
)
def test_packed_equals_reference(shape, features, kind, dtype, **how):
    x_norm = NO_NORM if kind == "none" else norm(kind, features, dtype=dtype)
    arguments = packed_linear_arguments(*shape, features, x_norm=x_norm, dtype=dtype, **how)
    assert_within_error_rule(ops.packed_linear(*arguments), packed_reference, arguments, ulps=8)


def test_packed_nothing():
    x, *_ = packed_linear_arguments(3, 16)
    with pytest.raises(ShapeError, match="first"):
        ops.packed_linear(x)
