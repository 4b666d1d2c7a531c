"""What the operators do on a GPU, with the interpreter in its place: every path, tiny workspaces."""

from weakref import WeakSet

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashsvd_compile.ops import attention_gpu
from flashsvd_compile.ops.attention import _cuda as attention_on_gpu
from flashsvd_compile.ops.attention import reference as attention_reference
from flashsvd_compile.ops.linear import _cuda as linear_on_gpu
from flashsvd_compile.ops.linear import reference as linear_reference
from flashsvd_compile.ops.mlp import RESIDUAL as RESIDUAL_OF_MLP
from flashsvd_compile.ops.mlp import _cuda as mlp_on_gpu
from flashsvd_compile.ops.mlp import reference as mlp_reference
from flashsvd_compile.ops.packed_linear import RESIDUAL as RESIDUAL_OF_PACKED
from flashsvd_compile.ops.packed_linear import _cuda as packed_linear_on_gpu
from flashsvd_compile.ops.packed_linear import reference as packed_linear_reference
from flashsvd_compile.ops.replay import record
from flashsvd_compile.ops.workspace import Workspace
from tests.kernels.chips import INTERPRETED, running_on
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import (
    attention_arguments,
    laid_out,
    linear_arguments,
    mlp_arguments,
    norm,
    packed_linear_arguments,
    padding,
)

LAYOUTS = ("contiguous", "transposed", "strided")
WORKSPACES = (1, 1 << 20)
DTYPES = (torch.float16, torch.float32)
RANKS = st.integers(1, 40)
CANCELLATION = 8
"""Units that pass where few numbers, or equal ones, make up a result, or sums of numbers found at random cancel."""


def assert_attention_right(arguments: tuple, chip: str, ulps: int = 2) -> None:
    with running_on(INTERPRETED[chip]):
        result = attention_on_gpu(*arguments)
    assert_within_error_rule(result, attention_reference, arguments, ulps=ulps, cancelling=ulps == CANCELLATION)


def assert_mlp_right(arguments: tuple, chip: str, ulps: int = 2) -> None:
    with running_on(INTERPRETED[chip]):
        result = mlp_on_gpu(*arguments)
    assert_within_error_rule(result, mlp_reference, arguments, ulps=ulps, cancelling=ulps == CANCELLATION)


ATTENTIONS = {
    "plain": {},
    "padded": {"key_padding": padding(33, 23, total=33)},
    "left padded": {"key_padding": padding(33, 23, total=33, left=True)},
    "nothing visible": {"key_padding": padding(33, 0, total=33)},
    "holes": {"key_padding": torch.arange(66).view(2, 33) % 3 > 0},
    "causal rotary": {"window": (-1, 0), "rotary_dim": 16},
    "partial interleaved rotary": {"rotary_dim": 8, "interleaved": True, "rotation_per_item": True},
    "window": {"window": (7, 0)},
    "grouped": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1, "window": (-1, 0)},
    "cross": {"kv_len": 53, "key_padding": padding(53, 9, total=53)},
    "dense queries and output": {"ranks": (None, 12, 10, None)},
    "dense keys": {"ranks": (12, None, 10, 11)},
    "ranks beyond the kernel": {"ranks": (400, 12, 390, 385)},
    "dense keys and values": {"ranks": (12, None, None, 11)},
    "dense keys and values side by side": {"ranks": (12, None, None, 11), "side_by_side": True},
    "dense keys and values side by side, no biases": {
        "ranks": (12, None, None, 11),
        "side_by_side": True,
        "bias": False,
        "num_kv_heads": 2,
    },
    "dense keys and values side by side, rotary": {
        "ranks": (12, None, None, 11),
        "side_by_side": True,
        "rotary_dim": 16,
    },
    "no output projection": {"out": False},
    "residual": {"residual": True},
    "residual without output projection": {"residual": True, "out": False},
    "residual of ranks beyond the kernel": {"residual": True, "ranks": (400, 12, 390, 385)},
    "residual around a norm": {"residual": True, "ranks": (400, 300, 390, 385), "x_norm": norm("rms", 64)},
    "down biases": {"down_bias": True},
    "no biases": {"bias": False},
    "arbitrary mask": {"mask": torch.rand(1, 1, 33, 33) < 0.5},
    "values of another size": {"value_dim": 8},
    "output of another width": {"out_features": 40},
    "output of another width, left padded": {"out_features": 72, "key_padding": padding(33, 23, total=33, left=True)},
    "output of another width, nothing visible": {"out_features": 40, "key_padding": padding(33, 0, total=33)},
    "merged": {"ranks": (40, 40, 44, 48), "strategy": "merged", "rotary_dim": 16, "residual": True},
    "merged keys": {"ranks": (12, 40, 10, 11), "strategy": "merged", "down_bias": True},
    "merged values": {"ranks": (40, None, 40, 11), "strategy": "merged", "x_norm": norm("rms", 64)},
    "merged side by side": {"ranks": (40, 40, 44, 48), "strategy": "merged", "down_bias": True},
    "merged for cross-attention": {"kv_len": 53, "ranks": (40, 40, 44, 48), "strategy": "merged", "bias": False},
    "merged of few heads, side by side": {"ranks": (40, 24, 24, 48), "strategy": "merged", "num_kv_heads": 2},
    "merged for one key": {"kv_len": 1, "ranks": (40, 40, 44, 48), "strategy": "merged"},
    "nothing to merge": {"strategy": "merged"},
    "absorbed": {
        "ranks": (12, None, None, 11),
        "num_kv_heads": 1,
        "head_dim": 24,
        "window": (-1, 0),
        "strategy": "absorbed",
    },
}


@pytest.mark.parametrize("workspace_bytes", WORKSPACES)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name, workspace_bytes):
    how = {"num_heads": 4, "head_dim": 16, "ranks": (12, 10, 9, 11), "workspace_bytes": workspace_bytes}
    options = {"kv_len": None} | how | ATTENTIONS[name]
    kv_len = options.pop("kv_len")
    for dtype in DTYPES:
        assert_attention_right(attention_arguments(2, 33, kv_len, 64, dtype=dtype, **options), "pointers")


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_recorded(name):
    """And right for other tensors."""
    how = {"num_heads": 4, "head_dim": 16, "ranks": (12, 10, 9, 11), "workspace_bytes": 1 << 20}
    options = {"kv_len": None} | how | ATTENTIONS[name]
    kv_len = options.pop("kv_len")
    first, second = (attention_arguments(2, 33, kv_len, 64, dtype=torch.float16, **options) for _ in range(2))
    with running_on(INTERPRETED["descriptors"]):
        _, recording = record(attention_on_gpu, first)
        assert recording.replay is not None
        assert_within_error_rule(recording.replay(*second), attention_reference, second, ulps=2)


@pytest.mark.parametrize("how", [{}, {"x_norm": norm("rms", 64)}], ids=["plain", "normalised"])
@pytest.mark.parametrize("ranks", [(301, 300, 299, 263), (301, 12, 9, 400)])
def test_odd_ranks_beyond_the_kernel(ranks, how):
    """The library multiplies copies whose rows are aligned, of rows enough."""
    how = {"num_heads": 4, "head_dim": 16, "ranks": ranks, "down_bias": True} | how
    for workspace_bytes in WORKSPACES:
        arguments = attention_arguments(2, 70, None, 64, dtype=torch.float16, workspace_bytes=workspace_bytes, **how)
        assert_attention_right(arguments, "pointers")


@pytest.mark.parametrize("rank", [12, 300])
def test_short_items_hold_one_workspace(rank, monkeypatch):
    """Queries of a rank beyond the kernel pass through one of their own, before that of keys and values."""
    alive = WeakSet()

    def workspace(elements, like, aligned=0, make=Workspace):
        made = make(elements, like, aligned)
        assert not alive, "the workspace before is still there"
        alive.add(made)
        return made

    monkeypatch.setattr(attention_gpu, "Workspace", workspace)
    arguments = attention_arguments(2, 70, None, 64, num_heads=4, ranks=(rank, 12, 9, 12), dtype=torch.float16)
    assert_attention_right(arguments, "descriptors")


def test_odd_ranks_of_short_items():
    """Rows too many for one launch of small products, on a chip with descriptors."""
    how = {
        "num_heads": 4,
        "head_dim": 16,
        "ranks": (12, 13, 9, 11),
        "down_bias": True,
        "key_padding": padding(90, 20, 70, total=90),
    }
    for workspace_bytes in WORKSPACES:
        arguments = attention_arguments(3, 90, None, 64, dtype=torch.float16, workspace_bytes=workspace_bytes, **how)
        assert_attention_right(arguments, "descriptors")


@pytest.mark.parametrize("ranks", [(21, None, 30), (16, None, 13), (7, None, 24)])
@pytest.mark.parametrize("rows", [130, 20])
def test_odd_ranks_of_a_fused_mlp(ranks, rows):
    how = {"width": 72, "ranks": ranks, "down_bias": True, "strategy": "fused", "dtype": torch.float16}
    assert_mlp_right(mlp_arguments(rows, 48, **how), "pointers")


@pytest.mark.parametrize("rows", [130, 20])
def test_an_odd_rank_of_a_linear(rows):
    arguments = linear_arguments(rows, 48, rank=13, down_bias=True, dtype=torch.float16, workspace_bytes=1 << 10)
    with running_on(INTERPRETED["pointers"]):
        assert_within_error_rule(linear_on_gpu(*arguments), linear_reference, arguments, ulps=2)


@given(
    batch=st.integers(1, 3),
    q_len=st.integers(1, 40),
    ranks=st.tuples(RANKS, RANKS, RANKS, RANKS),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    head_dim=st.sampled_from((8, 16, 24)),
    window=st.tuples(st.integers(-1, 9), st.integers(-1, 9)),
    residual=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    chip=st.sampled_from(("pointers", "descriptors")),
    strategy=st.sampled_from(("streamed", "merged")),
    workspace_bytes=st.integers(1, 20_000),
)
def test_any_attention(batch, q_len, kv_heads, group, head_dim, chip, **how):
    heads = {"num_heads": kv_heads * group, "num_kv_heads": kv_heads, "head_dim": head_dim}
    features = kv_heads * group * head_dim
    assert_attention_right(attention_arguments(batch, q_len, None, features, **heads, **how), chip, CANCELLATION)


@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=2),
    features=st.integers(8, 50),
    width=st.integers(8, 100),
    out_features=st.integers(8, 50),
    ranks=st.tuples(RANKS, st.none(), RANKS),
    bias=st.booleans(),
    down_bias=st.booleans(),
    residual=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    chip=st.sampled_from(tuple(INTERPRETED)),
    workspace_bytes=st.integers(1, 20_000),
)
def test_any_fused_mlp(shape, features, chip, **how):
    assert_mlp_right(mlp_arguments(*shape, features, strategy="fused", **how), chip, CANCELLATION)


@pytest.mark.parametrize("chip", INTERPRETED)
def test_one_item_for_the_whole_batch(chip):
    x, *rest = attention_arguments(3, 9, None, 32, head_dim=8, dtype=torch.float16)
    assert_attention_right((laid_out(x, "expanded"), *rest), chip)
    x, *rest = mlp_arguments(3, 1, 24, strategy="fused", dtype=torch.float16)
    assert_mlp_right((laid_out(x, "expanded"), *rest), chip)


@pytest.mark.parametrize(
    "how",
    [{"gated": True}, {"ranks": (None, None, 6)}, {"ranks": (5, None, None)}, {"ranks": (400, None, 6)}],
    ids=["gated", "dense hidden", "dense out", "rank beyond the kernel"],
)
def test_mlps_that_cannot_be_fused_are_streamed(how):
    assert_mlp_right(mlp_arguments(9, 24, strategy="fused", dtype=torch.float16, **how), "pointers")


FEW_ROWS = st.sampled_from(((1,), (1, 1), (2, 3), (16,), (17,)))
RANK_OR_DENSE = st.none() | RANKS


@given(
    shape=FEW_ROWS,
    ranks=st.tuples(RANK_OR_DENSE, RANK_OR_DENSE, RANK_OR_DENSE),
    gated=st.booleans(),
    bias=st.booleans(),
    down_bias=st.booleans(),
    residual=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
def test_an_mlp_of_few_rows(shape, **how):
    assert_mlp_right(mlp_arguments(*shape, 24, width=50, activation="silu", **how), "pointers", CANCELLATION)


@given(
    shape=FEW_ROWS,
    ranks=st.lists(RANK_OR_DENSE, min_size=1, max_size=3),
    bias=st.booleans(),
    down_bias=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
def test_projections_of_few_rows(shape, ranks, **how):
    with running_on(INTERPRETED["pointers"]):
        one = linear_arguments(*shape, 24, rank=ranks[0], **how)
        assert_within_error_rule(linear_on_gpu(*one), linear_reference, one, ulps=CANCELLATION)
        packed = packed_linear_arguments(*shape, 24, ranks=ranks, **how)
        assert_within_error_rule(packed_linear_on_gpu(*packed), packed_linear_reference, packed, ulps=CANCELLATION)


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)])
def test_no_rows(shape):
    assert mlp_on_gpu(*mlp_arguments(*shape, strategy="fused", dtype=torch.float16)).shape == (*shape[:-1], 16)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_no_queries(batch, length):
    arguments = attention_arguments(batch, length, dtype=torch.float16)
    assert attention_on_gpu(*arguments).shape == (batch, length, 32)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_few_rows_beside_vectors_and_residuals_of_any_strides(layout, rows):
    """Input and factors have contiguous rows, or these would not be for the kernel for few rows."""
    of_x = {"x_norm": norm("rms", 24, dtype=torch.float16), "residual": True, "dtype": torch.float16}
    packed = packed_linear_on_gpu, packed_linear_reference, RESIDUAL_OF_PACKED
    for on_gpu, reference, residual, arguments in (
        (*packed, packed_linear_arguments(rows, 24, ranks=(5,), **of_x)),
        (*packed, packed_linear_arguments(rows, 24, **of_x)),
        (mlp_on_gpu, mlp_reference, RESIDUAL_OF_MLP, mlp_arguments(rows, 24, gated=True, **of_x)),
    ):
        arguments = tuple(
            laid_out(a, layout) if isinstance(a, Tensor) and (a.dim() == 1 or i == residual) else a
            for i, a in enumerate(arguments)
        )
        with running_on(INTERPRETED["pointers"]):
            result = on_gpu(*arguments)
        assert_within_error_rule(result, reference, arguments, ulps=CANCELLATION, cancelling=True)
