"""``mlp_v3`` computes the specification, whatever the shape, ranks, dtype, strides and workspace."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashsvd_compile import ops
from flashsvd_compile.ops.activation import ACTIVATIONS
from flashsvd_compile.ops.mlp import reference, tiling
from flashsvd_compile.ops.mlp_region import Mlp

from .accuracy import assert_within_error_rule
from .regions import LAYOUTS, NO_NORM, mlp_arguments, norm, projection

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = st.none() | st.integers(1, 19)


def check(arguments: tuple, **how) -> None:
    """The operator keeps the error rule, as a whole or in chunks."""
    for workspace_bytes in {max(1, arguments[0].nbytes // 4), arguments[-1]}:
        assert_within_error_rule(ops.mlp(*arguments[:-1], workspace_bytes), reference, arguments, **how)


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    features=st.integers(1, 33),
    width=st.integers(1, 65),
    out_features=st.integers(1, 33),
    ranks=st.tuples(RANKS, RANKS, RANKS),
    gated=st.booleans(),
    bias=st.booleans(),
    down_bias=st.booleans(),
    residual=st.booleans(),
    x_norm=st.sampled_from(("none", "rms", "layer")),
    activation=st.sampled_from(tuple(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    strategy=st.sampled_from(("streamed", "merged")),
    workspace_bytes=st.integers(1, 3000),
)
def test_equals_reference(shape, features, x_norm, **how):
    of_x = NO_NORM if x_norm == "none" else norm(x_norm, features, bias=how["bias"], dtype=how["dtype"])
    arguments = mlp_arguments(*shape, features, x_norm=of_x, **how)
    check(arguments, ulps=8)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(activation, gated, dtype):
    arguments = mlp_arguments(5, 13, 32, width=96, gated=gated, activation=activation, dtype=dtype)
    check(arguments)


@pytest.mark.parametrize("rows_at_a_time", [0, 1, 2, 3, 5, 10, 11, 12])
def test_every_chunk_boundary(rows_at_a_time):
    per_row = 4 * (5 + 40 + 6)
    arguments = mlp_arguments(11, 16, workspace_bytes=1 + rows_at_a_time * per_row)
    check(arguments)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rank_out", [6, None])
@pytest.mark.parametrize("workspace_bytes", [1, 40_000, 200_000, 1_000_000])
def test_several_tiles_of_the_hidden_layer(gated, rank_out, workspace_bytes):
    """Wider than a tile, and no multiple of it."""
    how = {"width": 1500, "ranks": (20, 9, rank_out), "gated": gated, "workspace_bytes": workspace_bytes}
    arguments = mlp_arguments(50, 16, **how)
    check(arguments)


@pytest.mark.parametrize("workspace_elements", [1, 1000, 5000, 40_000, 10**6])
@pytest.mark.parametrize("gated", [False, True])
def test_a_tile_fits_the_workspace_and_grows_with_it(gated, workspace_elements):
    hidden, gate, out = (projection(16, 700, 20), projection(16, 700, 9), projection(700, 16, 6))
    tile = tiling(Mlp(hidden, gate if gated else None, out), 100, workspace_elements, 64)
    copies = 2 if gated else 1
    latent = 20  # the other ranks, 9 and 6, fit a row of the result, which has 16 features
    assert tile.elements == tile.rows * (latent + copies * tile.columns)
    assert tile.elements <= workspace_elements or tile.rows == 1
    assert tile.columns >= 64
    if workspace_elements == 10**6:
        assert (tile.rows, tile.columns) == (100, 700)


def test_bert_base_shape():
    arguments = mlp_arguments(
        4, 128, 768, width=3072, out_features=768, ranks=(192, None, 192), workspace_bytes=1 << 20
    )
    check(arguments)


def test_inputs_are_left_alone():
    arguments = mlp_arguments(11, 16, gated=True, residual=True)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    check(arguments)
    assert all(map(torch.equal, tensors, before))
