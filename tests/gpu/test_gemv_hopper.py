"""Products of several rows in Gluon on a Hopper GPU: every element written, none beside them, nothing read but x."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from flashsvd_compile.kernels import gemv
from flashsvd_compile.kernels.operands import Product, RmsNorm
from flashsvd_compile.ops.activation import ACTIVATIONS, activation_of
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import random

from .hopper import NEEDS_HOPPER, one_launch

pytestmark = NEEDS_HOPPER

HALVES = [torch.bfloat16, torch.float16]
BORDER = 8
ROWS = [2, 3, 7, 8]
EVEN = [(1024, 4096), (4096, 1024), (1493, 4096), (304, 72), (8, 8), (40, 264)]
ODD = [(4096, 1493), (11008, 1493), (24, 9), (8, 1), (1000, 515)]


def rows_of(values: Tensor, shifted: bool) -> Tensor:
    """Rows as a product reads them; beside shifted ones is nothing but NaN."""
    if not shifted:
        return values
    rows, columns = values.shape
    copies = room(rows, columns, values.dtype, shifted=True)
    for copy in copies:
        copy.copy_(values)
    return copies


def room(rows: int, columns: int, dtype: torch.dtype, shifted: bool = False) -> Tensor:
    """Room for a result, NaN as everything beside it: some columns of a wider matrix, or shifted rows."""
    like = torch.empty(0, dtype=dtype, device="cuda")
    if not shifted:
        return like.new_full((rows + 1, columns + 2 * BORDER), torch.nan)[:rows, BORDER:-BORDER]
    copies = gemv.shifted_rows(rows, columns, like)
    copies.as_strided((copies.untyped_storage().nbytes() // 2,), (1,)).fill_(torch.nan)
    return copies


def assert_untouched_beside(out: Tensor) -> None:
    """That everything beside a result in :func:`room` is NaN still."""
    (rows, columns), stride = out.shape, out.stride(0)
    whole = out.as_strided((rows + 1, columns + 2 * BORDER), (stride, 1), 0)
    assert whole.isnan().sum() == whole.numel() - out.numel()


def results_of(operands: tuple, activation: str | None, gated: bool, normed: bool) -> list[Tensor]:
    """The specification.

    Args:
        operands: ``x``, weight and bias of each product, then the norm's weight and the residual.
    """
    *of_products, of_norm, residual = operands
    products = [of_products[i : i + 3] for i in range(0, len(of_products), 3)]
    if normed:
        products = [(rms_norm(x, x.shape[-1:], of_norm, 1e-6), *rest) for x, *rest in products]
    results = [linear(*product) for product in products]
    if activation is not None:
        results[0] = activation_of(activation)(results[0])
    if gated:
        results = [results[0] * results[1]]
    return results if residual is None else [results[0] + residual]


def check(
    rows: int,
    shapes: list[tuple[int, int]],
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
    activation: str | None = None,
    gated: bool = False,
    norm: str | None = None,
    residual: bool = False,
    shifted_out: bool = False,
) -> None:
    """Multiply fresh operands and compare all results, and all of their copies."""
    shifted = any(depth % gemv.PERIOD for _, depth in shapes)
    xs = [random(rows, depth, dtype=dtype).cuda() for _, depth in shapes]
    xs = xs[:1] * len(xs) if norm else xs
    weights = [random(features, depth, dtype=dtype, scale=depth**-0.5).cuda() for features, depth in shapes]
    biases = [random(features, dtype=dtype).cuda() if bias else None for features, _ in shapes]
    of_norm = random(shapes[0][1], dtype=dtype).cuda() if norm == "weighted" else None
    added = random(rows, shapes[0][0], dtype=dtype).cuda() if residual else None
    outs = [room(rows, features, dtype, shifted_out) for features, _ in shapes]
    read = [rows_of(x, shifted) for x in xs]
    products = list(map(Product, read, weights, biases, outs))
    assert gemv.takes_hopper(*products)
    with one_launch() as launches:
        gemv.multiply(
            *products,
            activation=activation,
            gated=gated,
            norm=RmsNorm(of_norm, 1e-6) if norm else None,
            residual=added,
        )
    assert launches[0].kernel.__name__ == "gemv_hopper_kernel"
    given = *(operand for product in zip(xs, weights, biases, strict=True) for operand in product), of_norm, added
    for i, out in enumerate(outs[:1] if gated else outs):

        def expected(*operands, i=i) -> Tensor:
            return results_of(operands, activation, gated, norm is not None)[i]

        for copy in out if shifted_out else [out]:
            assert_within_error_rule(copy.contiguous(), expected, given, ulps=2)
        if not shifted_out:
            assert_untouched_beside(out)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", EVEN + ODD)
def test_shapes(shape, rows):
    check(rows, [shape], bias=False)
    check(rows, [shape], residual=True)


@pytest.mark.parametrize("rows", [5, 8])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shapes", [EVEN[:2], EVEN[:3], [EVEN[0], ODD[0]], ODD[:3], [(8, 8), (8, 8), (8, 9)]])
def test_products_of_unequal_shapes(shapes, dtype, rows):
    check(rows, shapes, dtype)


@pytest.mark.parametrize("rows", [5, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, *sorted(ACTIVATIONS)])
@pytest.mark.parametrize("depths", [(1493, 1493), (1024, 640), (1496, 451)])
def test_gated_pairs(depths, activation, bias, rows):
    check(rows, [(3000, depth) for depth in depths], bias=bias, activation=activation, gated=True)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("norm", ["plain", "weighted"])
@pytest.mark.parametrize("shapes", [[(1024, 4096)] * 3, [(1493, 4096)] * 2, [(304, 1000)], [(40, 8), (8, 8)]])
def test_normalised_rows(shapes, norm, rows):
    check(rows, shapes, bias=False, norm=norm)
    check(rows, shapes[:1], norm=norm, residual=True)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(1493, 4096), (48, 1493)])
def test_shifted_results(shape, rows):
    """What the next product reads whose weight has rows at odd addresses."""
    check(rows, [shape], shifted_out=True)


def test_what_is_beside_the_rows_of_a_weight_is_not_read():
    """The rows before and behind one, of which a tile brings some: nothing that they hold may show."""
    rows, features, depth = 8, 64, 515
    weight, x = random(features, depth, dtype=torch.bfloat16).cuda(), random(rows, depth, dtype=torch.bfloat16).cuda()
    out = room(rows, features, torch.bfloat16)
    weight[::2] = torch.nan
    gemv.multiply(Product(rows_of(x, True), weight, None, out))
    assert out[:, ::2].isnan().all()
    assert_within_error_rule(out[:, 1::2].contiguous(), linear, (x, weight[1::2]), ulps=2)


def test_left_to_the_other_kernel():
    """What descriptors cannot read: features that 8 does not divide, odd rows of ``x`` without shifted copies."""
    x, out = random(8, 515, dtype=torch.bfloat16).cuda(), room(8, 68, torch.bfloat16)
    weight = random(68, 515, dtype=torch.bfloat16).cuda()
    for operand in (x, rows_of(x, True)):
        assert not gemv.takes_hopper(Product(operand, weight, None, out))
        gemv.multiply(Product(operand, weight, None, out))
        assert_within_error_rule(out.contiguous(), linear, (x, weight), ulps=2)


@pytest.mark.parametrize("shape", [(4096, 1493), (4096, 1024)])
def test_the_same_again_and_again(shape):
    features, depth = shape
    weight = random(features, depth, dtype=torch.bfloat16).cuda()
    x = rows_of(random(8, depth, dtype=torch.bfloat16).cuda(), depth % 8 != 0)
    outs = [room(8, features, torch.bfloat16) for _ in range(20)]
    for i, out in enumerate(outs):
        gemv.multiply(Product(x, weight, None, out), follows=i > 0)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("rows", [1, 9])
def test_other_numbers_of_rows_go_through_the_other_kernel(rows):
    x, weight = random(rows, 1024, dtype=torch.bfloat16).cuda(), random(64, 1024, dtype=torch.bfloat16).cuda()
    with one_launch() as launches:
        gemv.multiply(Product(x, weight, None, room(rows, 64, torch.bfloat16)))
    assert launches[0].kernel is gemv.gemv_kernel
