"""Products with their activation and gate in Gluon on a Hopper GPU: every element written, none beside them."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from flashsvd_compile import ops
from flashsvd_compile.kernels.launch import listening
from flashsvd_compile.kernels.product_hopper import product_hopper
from flashsvd_compile.ops.activation import ACTIVATIONS, activation_of
from flashsvd_compile.ops.mlp import reference as mlp_reference
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import mlp_arguments, random

from .hopper import NEEDS_HOPPER, one_launch

pytestmark = NEEDS_HOPPER

DTYPES = [torch.bfloat16, torch.float16]


def reference(x, weight, bias, activation, hidden):
    product = linear(x, weight, bias)
    active = product if activation is None else activation_of(activation)(product)
    return active if hidden is None else active * hidden


def operands(
    rows: int, columns: int, depth: int, dtype: torch.dtype, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of products around 1, where activations bend."""
    x, vector = random(rows, depth, dtype=dtype).cuda(), random(columns, dtype=dtype).cuda()
    return x, random(columns, depth, dtype=dtype, scale=depth**-0.5).cuda(), vector if bias else None


def check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, gated: bool) -> None:
    """A product into memory of NaN, or as the gate of a random hidden layer, in place."""
    rows, columns = x.shape[0], weight.shape[0]
    hidden = random(rows, columns, dtype=x.dtype).cuda() if gated else None
    out = torch.full((rows, columns), torch.nan, dtype=x.dtype, device="cuda") if hidden is None else hidden.clone()
    product_hopper(x, weight, bias, activation, out, gated)
    assert_within_error_rule(out, reference, (x, weight, bias, activation, hidden))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("depth", [40, 1024, 1496])
@pytest.mark.parametrize("columns", [64, 776, 2048, 2816])
@pytest.mark.parametrize("rows", [1, 129, 1000, 5000])
def test_shapes(rows, columns, depth, gated):
    check(*operands(rows, columns, depth, torch.bfloat16, bias=True), "silu", gated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, *sorted(ACTIVATIONS)])
def test_activations(activation, bias, gated, dtype):
    check(*operands(300, 776, 1024, dtype, bias), activation, gated)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("depth", [64, 200])
@pytest.mark.parametrize("columns", [2816, 2952])
def test_many_tiles_of_few_steps(columns, depth, gated):
    """Tiles follow each other as fast as can be, some with columns for one piece or three only."""
    check(*operands(20000, columns, depth, torch.bfloat16, bias=True), "silu", gated)


@pytest.mark.parametrize("gated", [False, True])
def test_the_same_again_and_again(gated):
    x, weight, bias = operands(5000, 2816, 1496, torch.bfloat16, bias=True)
    hidden = random(5000, 2816, dtype=torch.bfloat16).cuda()
    outs = [hidden.clone() for _ in range(20)]
    for out in outs:
        product_hopper(x, weight, bias, "gelu", out, gated)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("columns", [776, 1000])
def test_what_lies_beside_is_neither_read_nor_written(columns, gated):
    rows, depth, dtype = 1000, 1496, torch.bfloat16
    x, weight, bias = operands(rows, columns, depth, dtype, bias=True)
    wide = [torch.full((len(m) + 1, depth + 72), torch.nan, dtype=dtype, device="cuda") for m in (x, weight)]
    inside = [w[:-1, 8 : 8 + depth].copy_(m) for w, m in zip(wide, (x, weight), strict=True)]
    hidden = random(rows, columns, dtype=dtype).cuda() if gated else None
    around = torch.full((rows + 2, columns + 304), torch.nan, dtype=dtype, device="cuda")
    out = around[1:-1, 16 : 16 + columns]
    out.fill_(7.0) if hidden is None else out.copy_(hidden)
    product_hopper(inside[0], inside[1], bias, "gelu", out, gated)
    assert_within_error_rule(out.contiguous(), reference, (x, weight, bias, "gelu", hidden))
    out.fill_(torch.nan)
    assert around.isnan().all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ranks", [(512, 256, 384), (501, 260, 397)])
@pytest.mark.parametrize(("rows", "taken"), [(6000, True), (300, False)])
@pytest.mark.parametrize("workspace_bytes", [40 << 20, 24 << 20])
def test_streamed_mlp(gated, ranks, rows, taken, workspace_bytes):
    """Taken where its tiles occupy the chip, also for ranks whose factors are copied."""
    shape = {"width": 2816, "out_features": 1024, "gated": gated, "activation": "silu", "strategy": "streamed"}
    given = mlp_arguments(1, rows, 1024, ranks=ranks, dtype=torch.bfloat16, workspace_bytes=workspace_bytes, **shape)
    arguments = tuple(a.cuda() if isinstance(a, Tensor) else a for a in given)
    kernels = []
    with listening(lambda launch, tensors: kernels.append(launch.kernel.__name__)):
        result = ops.mlp(*arguments)
    assert ("product_hopper_kernel" in kernels) == taken
    assert_within_error_rule(result, mlp_reference, arguments)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, *sorted(ACTIVATIONS)])
@pytest.mark.parametrize("columns", [776, 2816])
def test_nothing_spills(columns, activation, bias, gated):
    """The test of cross-compilation sees this kernel under Triton 3.6 only."""
    out = random(128, columns, dtype=torch.bfloat16).cuda()
    with one_launch() as launches:
        product_hopper(*operands(128, columns, 1024, torch.bfloat16, bias), activation, out, gated)
    assert launches[0].compiled.n_spills == 0
