"""``kernels.mlp`` against its formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from flashsvd_compile.kernels import mlp
from flashsvd_compile.kernels.tiles import MAX_RANK, empty_with_aligned_rows
from flashsvd_compile.ops.activation import ACTIVATIONS
from tests.kernels.chips import INTERPRETED, running_on
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import random

LAYOUTS = ("contiguous", "transposed", "strided")


def reference(latent: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, activation: str) -> Tensor:
    return linear(ACTIVATIONS[activation](linear(latent, up, bias)), down)


def core(
    rows: int,
    rank_in: int,
    rank_out: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float16,
    bias: bool = True,
    activation: str = "gelu",
    layout: str = "contiguous",
) -> tuple:
    """Arguments of ``mlp_core``; between the rows of the latent there is NaN."""
    latent = empty_with_aligned_rows(rows, rank_in, torch.empty(0, dtype=dtype))
    latent.copy_(random(rows, rank_in, dtype=dtype))
    up = random(width, rank_in, dtype=dtype, layout=layout, scale=rank_in**-0.5)
    down = random(rank_out, width, dtype=dtype, layout=layout, scale=width**-0.5)
    return latent, up, random(width, dtype=dtype, layout=layout) if bias else None, down, activation


def assert_right(arguments: tuple, chip: str, max_splits: int = mlp.MAX_SPLITS) -> None:
    with running_on(INTERPRETED[chip]):
        parts = mlp.mlp_core(*arguments, max_splits=max_splits)
    result = parts.sum(0)
    assert_within_error_rule(result, reference, arguments, ulps=2)


@given(
    rows=st.integers(4, 150),
    rank_in=st.integers(1, 140),
    rank_out=st.integers(1, 140),
    width=st.integers(8, 150),
    bias=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    chip=st.sampled_from(tuple(INTERPRETED)),
    max_splits=st.integers(1, 5),
)
def test_any_shape(rows, rank_in, rank_out, width, bias, layout, chip, max_splits):
    arguments = core(rows, rank_in, rank_out, width, bias=bias, layout=layout)
    assert_right(arguments, chip, max_splits)


@pytest.mark.parametrize("rank", [1, 5, 20, 96, 128])
@pytest.mark.parametrize("chip", INTERPRETED)
def test_float32(rank, chip):
    assert_right(core(37, rank, rank, 50, dtype=torch.float32), chip)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_activations(activation, dtype):
    """A range in which every activation shows both of its ends."""
    latent, *rest = core(40, 16, 24, 64, dtype=dtype, activation=activation)
    assert_right((latent * 3, *rest), "pointers")


@pytest.mark.parametrize(("rank_in", "rank_out"), [(192, 48), (48, 192), (304, 304), (384, 16), (300, 350)])
def test_ranks_of_several_pieces(rank_in, rank_out):
    assert_right(core(130, rank_in, rank_out, 96), "descriptors")


@pytest.mark.parametrize("chip", INTERPRETED)
def test_ranks_without_a_configuration_are_not_supported(chip):
    device = torch.device("cpu")
    with running_on(INTERPRETED[chip]):
        for rank in (0, MAX_RANK + 1):
            assert not mlp.supported(rank, 16, torch.float16, device)
            assert not mlp.supported(16, rank, torch.float16, device)
        assert mlp.supported(128, 128, torch.float16, device)
        assert mlp.supported(128, 128, torch.float32, device)
        assert not mlp.supported(MAX_RANK, MAX_RANK, torch.float32, device)
