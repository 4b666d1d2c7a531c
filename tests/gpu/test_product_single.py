"""Products in float32 by tensor cores: as exact as the library's, every element written, none beside them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from flashsvd_compile import ops
from flashsvd_compile.kernels.launch import listening
from flashsvd_compile.kernels.operands import Product
from flashsvd_compile.kernels.product_single import product_pair, product_single, takes
from flashsvd_compile.kernels.target import target_of
from flashsvd_compile.ops.activation import ACTIVATIONS, activation_of
from flashsvd_compile.ops.mlp import reference as mlp_reference
from flashsvd_compile.ops.workspace import activated_into, add_product, affine_into, affine_plus, affines_into
from tests.ops.accuracy import assert_within_error_rule, in_float64, relative_error
from tests.ops.regions import mlp_arguments
from tests.ops.regions import random as random_on_cpu


def on_such_a_gpu() -> bool:
    return torch.cuda.is_available() and target_of(torch.device("cuda")).triple_tf32


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not on_such_a_gpu(), reason="needs a GPU whose tensor cores are the faster ones"),
]


def random(*shape: int, **how) -> Tensor:
    return random_on_cpu(*shape, dtype=torch.float32, **how).cuda()


def reference(x, weight, bias, activation, gate, residual):
    result = linear(x, weight, bias)
    result = result if activation is None else activation_of(activation)(result)
    result = result if gate is None else result * gate
    return result if residual is None else result + residual


@pytest.mark.parametrize("form", ["alone", "gate", "residual"])
@pytest.mark.parametrize("depth", [5, 192, 304, 1493])
@pytest.mark.parametrize("columns", [7, 304, 1024])
@pytest.mark.parametrize("rows", [33, 129, 5000])
def test_shapes(rows, columns, depth, form):
    x, weight, bias = random(rows, depth), random(columns, depth, scale=depth**-0.5), random(columns)
    beside, out = random(rows, columns), torch.full((rows, columns), torch.nan, device="cuda")
    after: dict[str, Any] = {} if form == "alone" else {form: beside}
    product_single(Product(x, weight, bias, out), "gelu", **after)
    given = x, weight, bias, "gelu", after.get("gate"), after.get("residual")
    assert_within_error_rule(out, reference, given, ulps=2)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_activations_and_layouts(activation, layout):
    x, weight, bias = random(3000, 304, layout=layout), random(768, 304, scale=0.06, layout=layout), random(768)
    out = torch.full((3000, 768), torch.nan, device="cuda")
    product_single(Product(x, weight, bias, out), activation)
    assert_within_error_rule(out, reference, (x, weight, bias, activation, None, None))


def test_what_the_library_is_replaced_by():
    """Products, sums and activations of float32, in one launch each, and only where nobody allowed tf32."""
    x, weight, bias, out = random(4096, 304), random(768, 304, scale=0.06), random(768), random(4096, 768)
    added, launches = out.clone(), []
    with listening(lambda launch, tensors: launches.append(launch)):
        plain = affine_into(torch.empty_like(out), x, weight, bias)
        plus = affine_plus(torch.empty_like(out), x, weight, bias, out)
        activated = activated_into(torch.empty_like(out), x, weight, bias, "gelu")
        add_product(added, x, weight)
    assert len(launches) == 4
    assert_within_error_rule(plain, reference, (x, weight, bias, None, None, None))
    assert_within_error_rule(plus, reference, (x, weight, bias, None, None, out))
    assert_within_error_rule(activated, reference, (x, weight, bias, "gelu", None, None))
    assert_within_error_rule(added, reference, (x, weight, None, None, None, out))
    torch.set_float32_matmul_precision("high")
    assert not takes(target_of(x.device), out.shape)


@pytest.mark.parametrize("shapes", [((3072, 768, 192), (3072, 768, 192)), ((129, 300, 65), (4000, 9, 304))])
@pytest.mark.parametrize("biases", [(False, True), (True, False)])
def test_two_at_once(shapes, biases):
    """Each of ``[rows, depth] -> [rows, columns]``."""
    products = [
        Product(
            random(rows, depth),
            random(columns, depth, scale=depth**-0.5),
            random(columns) if bias else None,
            torch.full((rows, columns), torch.nan, device="cuda"),
        )
        for (rows, depth, columns), bias in zip(shapes, biases, strict=True)
    ]
    product_pair(*products)
    for product in products:
        assert_within_error_rule(product.out, linear, product[:3], ulps=2)


def test_two_small_products_are_one_launch():
    """Where each alone is left to the library, as its tiles do not occupy the chip."""
    products = [Product(random(1024, 768), random(256, 768, scale=0.04), None, random(1024, 256)) for _ in range(2)]
    assert not takes(target_of(products[0].out.device), products[0].out.shape)
    launches = []
    with listening(lambda launch, tensors: launches.append(launch)):
        affines_into(*products)
    assert len(launches) == 1
    for product in products:
        assert_within_error_rule(product.out, linear, product[:3])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_more_exact_than_the_library(scale):
    """Sums of 3072 products, also where trailing bits are below or products near the ends of float32's range."""
    x, weight = random(4096, 3072, scale=scale), random(304, 3072)
    out = torch.empty(4096, 304, device="cuda")
    product_single(Product(x, weight, None, out))
    exact = linear(*in_float64((x, weight)))
    assert relative_error(out, exact) < 0.7 * relative_error(linear(x, weight), exact)
    share = (out.double() * exact).sum() / exact.square().sum() - 1
    assert abs(share) < 7e-8, "sums come out larger or smaller, which adds up over layers"


def test_infinities():
    """They give what they give in float32, and NaN of any bits stays in its row."""
    x, weight = random(2048, 304).abs(), random(768, 304).abs()
    x[3, 5], x[700, 11], x[1000, 0] = torch.inf, -torch.inf, torch.nan
    x[1001].view(torch.int32)[7] = 0x7FFFFFFF  # which the GPU's own arithmetic makes
    out = torch.empty(2048, 768, device="cuda")
    product_single(Product(x, weight, None, out))
    assert (out[3] == torch.inf).all() and (out[700] == -torch.inf).all() and out[1000:1002].isnan().all()
    assert int((~out.isfinite()).any(1).sum()) == 4


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("workspace_bytes", [1 << 22, 1 << 25])
@pytest.mark.parametrize("down_bias", [False, True])
def test_streamed_mlp(gated, workspace_bytes, down_bias):
    """Ranges of the hidden layer are activated as they are multiplied, and summed in rank space."""
    shape = {"width": 3072, "out_features": 768, "gated": gated, "activation": "silu" if gated else "gelu"}
    how = {"strategy": "streamed", "workspace_bytes": workspace_bytes, "dtype": torch.float32, "down_bias": down_bias}
    given = mlp_arguments(4, 2048, 768, ranks=(304, 304, 301), **shape, **how)
    arguments = tuple(a.cuda() if isinstance(a, Tensor) else a for a in given)
    assert_within_error_rule(ops.mlp(*arguments), mlp_reference, arguments)
