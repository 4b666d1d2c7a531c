"""The fused MLP core in Gluon on a Hopper GPU: every element written, and right by the error rule."""

import pytest
import torch
from torch.nn.functional import linear

from flashsvd_compile.kernels.mlp import SPECIALISED_RANKS, mlp_core
from flashsvd_compile.kernels.mlp_hopper import mlp_core_hopper
from flashsvd_compile.ops.activation import ACTIVATIONS, activation_of
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import random

from .hopper import NEEDS_HOPPER, one_launch

pytestmark = NEEDS_HOPPER


def reference(latent, up, bias, down, activation):
    return linear(activation_of(activation)(linear(latent, up, bias)), down)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(304, 304), (320, 264), (96, 192)])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (129, 3000), (1000, 1024)])
@pytest.mark.parametrize(("activation", "bias"), [("gelu", True), ("silu", False)])
def test_core(dtype, ranks, rows, width, activation, bias):
    rank_in, rank_out = ranks
    latent, up, down, vector = (
        random(*shape, dtype=dtype).cuda() for shape in ((rows, rank_in), (width, rank_in), (rank_out, width), (width,))
    )
    arguments = latent, up, vector if bias else None, down, activation
    out = torch.full((rows, rank_out), torch.nan, dtype=dtype, device="cuda")
    mlp_core_hopper(*arguments, out, width_per_split=-(-width // 64) * 64)
    assert_within_error_rule(out, reference, arguments)


def test_partial_sums_add_up():
    latent, up, down = (random(*shape, dtype=torch.float16).cuda() for shape in ((200, 304), (1000, 304), (304, 1000)))
    parts = torch.full((3, 200, 304), torch.nan, dtype=torch.float16, device="cuda")
    mlp_core_hopper(latent, up, None, down, "relu", parts.view(600, 304), width_per_split=384)
    whole = parts.float().sum(0).half()
    assert_within_error_rule(whole, reference, (latent, up, None, down, "relu"))


@pytest.mark.parametrize("rank", [SPECIALISED_RANKS.start - 1, *SPECIALISED_RANKS[::21], SPECIALISED_RANKS.stop])
@pytest.mark.parametrize("rows", [5, 300, 20000])
def test_taken_where_it_is_faster(rank, rows):
    latent, up, down, bias = (
        random(*shape, dtype=torch.bfloat16).cuda() for shape in ((rows, rank), (1024, rank), (rank, 1024), (1024,))
    )
    with one_launch() as launches:
        parts = mlp_core(latent, up, bias, down, "gelu")
    assert (launches[0].kernel.__name__ == "mlp_hopper_kernel") == (rank in SPECIALISED_RANKS)
    assert_within_error_rule(parts.float().sum(0).bfloat16(), reference, (latent, up, bias, down, "gelu"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_nothing_spills(activation, bias):
    """With the tests of cross-compilation this is seen under every Triton that is known."""
    latent, up, down, vector = (
        random(*shape, dtype=torch.bfloat16).cuda() for shape in ((128, 320), (1024, 320), (320, 1024), (1024,))
    )
    with one_launch() as launches:
        mlp_core(latent, up, vector if bias else None, down, activation)
    assert launches[0].compiled.n_spills == 0
