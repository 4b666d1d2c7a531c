"""``kernels.gemv`` against its formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from flashsvd_compile.kernels import gemv
from flashsvd_compile.kernels.operands import Product, RmsNorm
from tests.kernels.chips import INTERPRETED, running_on
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import random

CANCELLATION = 8
ALIGNED, OFF_BY_ONE = 0, 1


def weight(features: int, depth: int, dtype: torch.dtype, offset: int) -> Tensor:
    """A matrix that starts ``offset`` elements behind a 16-byte boundary, with NaN before and after it."""
    memory = torch.full((features * depth + 2 * 64,), float("nan"), dtype=dtype)
    found = memory[64 + offset : 64 + offset + features * depth].view(features, depth)
    return found.copy_(random(features, depth, dtype=dtype, scale=depth**-0.5))


def product(rows: int, depth: int, features: int, bias: bool, dtype: torch.dtype, offset: int) -> Product:
    out = torch.full((rows, features + 16), float("nan"), dtype=dtype)[:, 8:-8]
    added = random(features, dtype=dtype) if bias else None
    return Product(random(rows, depth, dtype=dtype), weight(features, depth, dtype, offset), added, out)


def multiply(*products: Product, chip: str = "pointers", **how) -> None:
    with running_on(INTERPRETED[chip]):
        gemv.multiply(*products, **how)


def assert_right(p: Product) -> None:
    """The borders of a result must stay as they are."""
    assert_within_error_rule(p.out.contiguous(), linear, (p.x, p.weight, p.bias), ulps=CANCELLATION)
    whole = p.out.as_strided((p.out.shape[0], p.out.shape[1] + 16), p.out.stride(), p.out.storage_offset() - 8)
    assert whole[:, :8].isnan().all() and whole[:, -8:].isnan().all()


@given(
    rows=st.integers(1, gemv.MAX_ROWS),
    depth=st.integers(1, 600),
    features=st.lists(st.integers(1, 40), min_size=1, max_size=gemv.MAX_PRODUCTS),
    bias=st.booleans(),
    dtype=st.sampled_from((torch.float16, torch.float32)),
    offset=st.sampled_from((ALIGNED, OFF_BY_ONE)),
    chip=st.sampled_from(tuple(INTERPRETED)),
)
def test_any_shape(rows, depth, features, bias, dtype, offset, chip):
    """All rows of weights at odd addresses, some of them, or none."""
    products = [product(rows, depth, f, bias, dtype, offset) for f in features]
    multiply(*products, chip=chip)
    for p in products:
        assert_right(p)


@pytest.mark.parametrize("rows", [1, 5])
def test_products_of_different_depths_and_biases(rows):
    sizes = [(64, 40, True), (37, 21, False), (530, 9, True)]
    products = [product(rows, depth, features, bias, torch.float16, ALIGNED) for depth, features, bias in sizes]
    multiply(*products)
    for p in products:
        assert_right(p)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("depths", [(64, 64), (37, 53)])
def test_gated_pair(rows, depths):
    gate, hidden = (product(rows, depth, 30, True, torch.float16, ALIGNED) for depth in depths)
    multiply(gate, hidden, activation="silu", gated=True)

    def reference(x, w, b, y, v, c):
        return silu(linear(x, w, b)) * linear(y, v, c)

    arguments = (gate.x, gate.weight, gate.bias, hidden.x, hidden.weight, hidden.bias)
    assert_within_error_rule(gate.out.contiguous(), reference, arguments, ulps=CANCELLATION)
    assert hidden.out.isnan().all()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("depth", [64, 37, 530])
def test_a_norm_of_one_row(depth, dtype, weighted):
    """Of all products of a launch; the row may be as large as its dtype allows."""
    x = random(1, depth, dtype=dtype) * 1e4
    products = [
        product(1, depth, features, bias, dtype, ALIGNED)._replace(x=x) for features, bias in ((40, True), (9, False))
    ]
    scale = random(depth, dtype=dtype) + 1 if weighted else None
    multiply(*products, norm=RmsNorm(scale, 1e-5))
    for p in products:

        def reference(x, weight, bias, scale):
            return linear(rms_norm(x, (depth,), scale, 1e-5), weight, bias)

        assert_within_error_rule(p.out.contiguous(), reference, (x, p.weight, p.bias, scale), ulps=CANCELLATION)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("depth", [64, 37])
def test_residual(rows, bias, depth):
    p = product(rows, depth, 40, bias, torch.float16, ALIGNED)
    wide = random(rows, 60, dtype=torch.float16)
    added = wide[:, 7:47]
    multiply(p, residual=added)

    def reference(x, weight, bias, added):
        return linear(x, weight, bias) + added

    assert_within_error_rule(p.out.contiguous(), reference, (p.x, p.weight, p.bias, added), ulps=CANCELLATION)


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_of_weights_apart_from_each_other(rows):
    """A slice of a wider matrix, with NaN between its rows: nothing of a neighbour may leak in."""
    for width, columns in ((96, slice(8, 61)), (75, slice(16, 49))):
        wide = torch.full((23, width), float("nan"), dtype=torch.float16)
        w = wide[:, columns]
        w.copy_(random(*w.shape, dtype=torch.float16))
        x, out = random(rows, w.shape[1], dtype=torch.float16), torch.empty(rows, 23, dtype=torch.float16)
        multiply(Product(x, w, None, out))
        assert_within_error_rule(out, linear, (x, w), ulps=CANCELLATION)


def test_what_is_supported():
    x, w = torch.empty(1, 32), torch.empty(8, 32)
    assert gemv.supported(x, [w])
    assert not gemv.supported(x.expand(gemv.MAX_ROWS + 1, 32), [w])
    assert not gemv.supported(x[:0], [w])
    assert not gemv.supported(x, [w, torch.empty(32, 8).t()])
    assert not gemv.supported(x.double(), [w.double()])
