"""``kernels.product_single`` against its formula; that it multiplies by tensor cores shows on a GPU only."""

from functools import partial
from math import inf, nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from flashsvd_compile.kernels.operands import Product
from flashsvd_compile.kernels.product_single import product_pair, product_single
from flashsvd_compile.ops.activation import ACTIVATIONS
from tests.kernels.chips import INTERPRETED, running_on
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import random as random_of

random = partial(random_of, dtype=torch.float32)
LAYOUTS = ("contiguous", "transposed", "strided")
BESIDE = ("gate", "residual")


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, beside: Tensor, activation: str | None, form: str | None):
    result = linear(x, weight, bias)
    result = result if activation is None else ACTIVATIONS[activation](result)
    return result if form is None else result * beside if form == "gate" else result + beside


@given(
    rows=st.integers(4, 300),
    columns=st.integers(4, 150),
    depth=st.integers(1, 100),
    bias=st.booleans(),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    activation=st.sampled_from([None, "gelu"]),
    form=st.sampled_from([None, *BESIDE]),
    replaced=st.booleans(),
    chip=st.sampled_from(tuple(INTERPRETED)),
)
def test_any_shape(rows, columns, depth, bias, layouts, activation, form, replaced, chip):
    """The result is the middle of a wider matrix, whose borders stay as they are; it may replace what is beside."""
    x = random(rows, depth, layout=layouts[0])
    weight = random(columns, depth, layout=layouts[1], scale=depth**-0.5)
    vector, beside = random(columns) if bias else None, random(rows, columns)
    wide = torch.full((rows, columns + 8), float("nan"))
    out = wide[:, 4:-4]
    other = out.copy_(beside) if replaced else beside
    after: dict[str, Any] = {} if form is None else {form: other}
    with running_on(INTERPRETED[chip]):
        product_single(Product(x, weight, vector, out), activation, **after)
    assert wide[:, :4].isnan().all() and wide[:, -4:].isnan().all()
    assert_within_error_rule(out.contiguous(), reference, (x, weight, vector, beside, activation, form), ulps=2)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation):
    x, weight, bias, gate = random(70, 40), random(40, 40, scale=0.2), random(40), random(70, 40)
    out = torch.full((70, 40), float("nan"))
    product_single(Product(x, weight, bias, out), activation, gate=gate)
    assert_within_error_rule(out, reference, (x, weight, bias, gate, activation, "gate"), ulps=2)


@pytest.mark.parametrize("rows", [1, 63, 129, 1100])
def test_blocks_of_rows_come_in_groups(rows):
    x, weight = random(rows, 20), random(200, 20)
    out = torch.full((rows, 200), float("nan"))
    product_single(Product(x, weight, None, out))
    assert_within_error_rule(out, linear, (x, weight), ulps=2)


@pytest.mark.parametrize("value", [inf, -inf, nan])
def test_infinities_and_nan(value):
    """They come out as of products in float32, though an infinity less its leading bits is NaN."""
    x, weight, out = random(70, 40), random(40, 40), torch.full((70, 40), float("nan"))
    x[3, 5], weight[7, 11] = value, value
    x[9].view(torch.int32)[0] = 0x7FFFFFFF  # the NaN that GPUs make
    product_single(Product(x, weight, None, out))
    torch.testing.assert_close(out, linear(x, weight), equal_nan=True)


@given(
    rows=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    columns=st.tuples(st.integers(4, 150), st.integers(4, 150)),
    depths=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    biases=st.tuples(st.booleans(), st.booleans()),
    layout=st.sampled_from(LAYOUTS),
    chip=st.sampled_from(tuple(INTERPRETED)),
)
def test_two_at_once(rows, columns, depths, biases, layout, chip):
    """Of any two shapes; each result is the middle of a wider matrix, whose borders stay as they are."""
    products, wides = [], []
    for n, f, depth, bias in zip(rows, columns, depths, biases, strict=True):
        x, weight = random(n, depth, layout=layout), random(f, depth, scale=depth**-0.5)
        wides.append(torch.full((n, f + 8), nan))
        products.append(Product(x, weight, random(f) if bias else None, wides[-1][:, 4:-4]))
    with running_on(INTERPRETED[chip]):
        product_pair(*products)
    for product, wide in zip(products, wides, strict=True):
        assert wide[:, :4].isnan().all() and wide[:, -4:].isnan().all()
        assert_within_error_rule(product.out.contiguous(), linear, product[:3], ulps=2)
