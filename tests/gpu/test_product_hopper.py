"""Products and what follows them in Gluon on a Hopper GPU: every element written, none beside them."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from flashsvd_compile import ops
from flashsvd_compile.kernels.launch import listening
from flashsvd_compile.kernels.operands import Product, Rotation
from flashsvd_compile.kernels.product_hopper import product_hopper
from flashsvd_compile.ops import mlp_gpu, mlp_tiles, workspace
from flashsvd_compile.ops.activation import ACTIVATIONS, activation_of
from flashsvd_compile.ops.attention import reference as attention_reference
from flashsvd_compile.ops.mlp import RESIDUAL
from flashsvd_compile.ops.mlp import reference as mlp_reference
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import attention_arguments, mlp_arguments, norm, random

from .hopper import NEEDS_HOPPER, one_launch

pytestmark = NEEDS_HOPPER

DTYPES = [torch.bfloat16, torch.float16]


FORMS = ["alone", "gate", "residual"]


def reference(x, weight, bias, activation, gate, residual):
    result = linear(x, weight, bias)
    if activation is not None:
        result = activation_of(activation)(result)
    if gate is not None:
        result = result * gate
    return result if residual is None else result + residual


Operands = tuple[Tensor, Tensor, Tensor | None]


def operands(rows: int, columns: int, depth: int, dtype: torch.dtype, bias: bool) -> Operands:
    """Of products around 1, where activations bend."""
    x, vector = random(rows, depth, dtype=dtype).cuda(), random(columns, dtype=dtype).cuda()
    return x, random(columns, depth, dtype=dtype, scale=depth**-0.5).cuda(), vector if bias else None


def filled(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, form: str) -> Tensor:
    """Multiply into a matrix of any contents, and check it; what is beside the product is random."""
    beside = random(*out.shape, dtype=out.dtype).cuda()
    out.copy_(beside) if form == "gate" else out.fill_(torch.nan)
    product_hopper(Product(x, weight, bias, out), activation, *beside_of(form, out, beside))
    given = x, weight, bias, activation, *beside_of(form, beside, beside)
    assert_within_error_rule(out.contiguous(), reference, given)
    return out


def beside_of(form: str, gate: Tensor, residual: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gate and the residual of a form."""
    return gate if form == "gate" else None, residual if form == "residual" else None


def empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Room for a result."""
    return torch.empty(rows, columns, dtype=dtype, device="cuda")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("depth", [40, 1024, 1496])
@pytest.mark.parametrize("columns", [64, 776, 2048, 2816])
@pytest.mark.parametrize("rows", [1, 129, 1000, 5000])
def test_shapes(rows, columns, depth, form):
    activation = "silu" if form in ("alone", "gate") else None
    given = operands(rows, columns, depth, torch.bfloat16, bias=True)
    filled(empty(rows, columns, torch.bfloat16), *given, activation, form)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, *sorted(ACTIVATIONS)])
def test_activations(activation, bias, form, dtype):
    filled(empty(300, 776, dtype), *operands(300, 776, 1024, dtype, bias), activation, form)


def gated(x, weight, bias, activation, other_x, other_weight, other_bias):
    """The specification of a product that another one gates."""
    return reference(x, weight, bias, activation, linear(other_x, other_weight, other_bias), None)


def gated_in_one_launch(out: Tensor, given: Operands, other: Operands, activation: str | None) -> Tensor:
    """Multiply both into a matrix of any contents, and check it."""
    out.fill_(torch.nan)
    product_hopper(Product(*given, out), activation, Product(*other, out))
    assert_within_error_rule(out.contiguous(), gated, (*given, activation, *other))
    return out


@pytest.mark.parametrize("depth", [40, 1024, 1496])
@pytest.mark.parametrize("other_depth", [40, 1024])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (129, 776), (1000, 2816), (5000, 2048)])
def test_product_gated_by_a_product(rows, columns, other_depth, depth):
    dtype = torch.bfloat16
    given, other = (operands(rows, columns, d, dtype, bias=True) for d in (depth, other_depth))
    gated_in_one_launch(empty(rows, columns, dtype), given, other, "silu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biases", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("activation", [None, *sorted(ACTIVATIONS)])
def test_activations_of_products_gated_by_products(activation, biases, dtype):
    given, other = (operands(300, 776, 512, dtype, bias) for bias in biases)
    gated_in_one_launch(empty(300, 776, dtype), given, other, activation)


@pytest.mark.parametrize("depth", [64, 200])
@pytest.mark.parametrize("columns", [2816, 2952])
def test_many_tiles_gated_by_products_of_few_steps_again_and_again(columns, depth):
    """Into what lies inside a matrix, beside which nothing is written."""
    given, other = (operands(20000, columns, d, torch.bfloat16, bias=True) for d in (depth, 64))
    around = empty(20002, columns + 304, torch.bfloat16).fill_(torch.nan)
    out = gated_in_one_launch(around[1:-1, 16 : 16 + columns], given, other, "silu")
    first = out.clone()
    for _ in range(10):
        product_hopper(Product(*given, out.fill_(torch.nan)), "silu", Product(*other, out))
        assert torch.equal(out, first)
    out.fill_(torch.nan)
    assert around.isnan().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("depth", [64, 200])
@pytest.mark.parametrize("columns", [2816, 2952])
def test_many_tiles_of_few_steps(columns, depth, form):
    """Tiles follow each other as fast as can be, some with columns for one piece or three only."""
    given = operands(20000, columns, depth, torch.bfloat16, bias=True)
    filled(empty(20000, columns, torch.bfloat16), *given, None, form)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_again_and_again(form):
    x, weight, bias = operands(5000, 2816, 1496, torch.bfloat16, bias=True)
    beside = random(5000, 2816, dtype=torch.bfloat16).cuda()
    outs = [beside.clone() for _ in range(20)]
    for out in outs:
        product_hopper(Product(x, weight, bias, out), None, *beside_of(form, out, beside))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_residual_in_place():
    x, weight, bias = operands(5000, 2816, 1496, torch.bfloat16, bias=True)
    residual = random(5000, 2816, dtype=torch.bfloat16).cuda()
    out = residual.clone()
    product_hopper(Product(x, weight, bias, out), residual=out)
    assert_within_error_rule(out, reference, (x, weight, bias, None, None, residual))


def rotated(x, weight, bias, cos, sin, first):
    """The specification of a product whose heads are rotated."""
    positions = (first + torch.arange(len(x), device=x.device)) % len(cos)
    cos, sin = cos[positions, None], sin[positions, None]
    heads = linear(x, weight, bias).unflatten(-1, (-1, cos.shape[-1]))
    turned = torch.cat((-heads[..., 64:], heads[..., :64]), -1)
    return (heads * cos + turned * sin).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "positions", "first"), [(1000, 1000, 0), (300, 1000, 650), (5000, 1024, 64), (64, 64, 0)]
)
@pytest.mark.parametrize(("columns", "depth"), [(128, 40), (384, 1504), (4096, 1024), (4096, 40)])
def test_rotation(columns, depth, rows, positions, first, bias, dtype):
    """Whole heads of one item, some rows of it, and rows of several."""
    given = operands(rows, columns, depth, dtype, bias)
    cos, sin = (random(positions, 128, dtype=dtype).cuda() for _ in range(2))
    for _ in range(3):
        out = empty(rows, columns, dtype).fill_(torch.nan)
        product_hopper(Product(*given, out), rotation=Rotation(cos, sin, first))
        assert_within_error_rule(out, rotated, (*given, cos, sin, first))


@pytest.mark.parametrize("depth", [64, 200])
def test_rotation_of_many_tiles_of_few_steps_again_and_again(depth):
    """Tiles follow each other as fast as can be, some with one head only."""
    given = operands(20000, 2944, depth, torch.bfloat16, bias=True)
    cos, sin = (random(1024, 128, dtype=torch.bfloat16).cuda() for _ in range(2))
    outs = [empty(20000, 2944, torch.bfloat16).fill_(torch.nan) for _ in range(10)]
    for out in outs:
        product_hopper(Product(*given, out), rotation=Rotation(cos, sin))
    assert_within_error_rule(outs[0], rotated, (*given, cos, sin, 0))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_rotation_writes_nothing_beside():
    x, weight, bias = operands(1000, 384, 200, torch.bfloat16, bias=True)
    cos, sin = (random(1000, 128, dtype=torch.bfloat16).cuda() for _ in range(2))
    around = empty(1002, 1024, torch.bfloat16).fill_(torch.nan)
    out = around[1:-1, 64:448]
    product_hopper(Product(x, weight, bias, out), rotation=Rotation(cos, sin))
    assert_within_error_rule(out.contiguous(), rotated, (x, weight, bias, cos, sin, 0))
    out.fill_(torch.nan)
    assert around.isnan().all()


@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize(("length", "rotary_dim"), [(2048, 128), (2000, 128), (2048, 64)])
@pytest.mark.parametrize(("workspace_bytes", "items"), [(24 << 20, 1), (80 << 20, 2)])
def test_attention_rotates_in_its_products(length, rotary_dim, per_item, workspace_bytes, items):
    """A pass of its own does it where less than a head is rotated, or uneven items that come together share tables."""
    given = attention_arguments(
        2, length, features=2048, num_heads=16, head_dim=128, ranks=(512, 512, 512, 512), window=(-1, 0),
        rotary_dim=rotary_dim, rotation_per_item=per_item, x_norm=norm("rms", 2048, dtype=torch.bfloat16),
        dtype=torch.bfloat16, workspace_bytes=workspace_bytes,
    )  # fmt: skip
    arguments = tuple(a.cuda() if isinstance(a, Tensor) else a for a in given)
    kernels = []
    with listening(lambda launch, tensors: kernels.append(launch.kernel.__name__)):
        result = ops.attention(*arguments)
    by_products = rotary_dim == 128 and (length % 64 == 0 or per_item or items == 1)
    assert ("rotary_kernel" in kernels) != by_products
    assert_within_error_rule(result, attention_reference, arguments)


@pytest.mark.parametrize("kv_heads", [16, 8])
def test_rotated_chunks(kv_heads):
    """Queries come by halves, keys by halves of 16 heads or as 8; recorded at the second call, made again after it."""
    x, *weights = attention_arguments(
        1, 4096, features=2048, num_heads=16, num_kv_heads=kv_heads, head_dim=128, ranks=(512, 512, 512, 512),
        window=(-1, 0), rotary_dim=128, x_norm=norm("rms", 2048, dtype=torch.bfloat16), dtype=torch.bfloat16,
        workspace_bytes=24 << 20,
    )  # fmt: skip
    weights = [a.cuda() if isinstance(a, Tensor) else a for a in weights]
    kernels = []
    with listening(lambda launch, tensors: kernels.append(launch.kernel.__name__)):
        for _ in range(4):
            fresh = random(*x.shape, dtype=x.dtype).cuda()
            assert_within_error_rule(ops.attention(fresh, *weights), attention_reference, (fresh, *weights))
    assert "rotary_kernel" not in kernels
    queries, keys = 2, kv_heads // 8
    assert kernels.count("product_hopper_kernel") == queries + keys  # of the first call: a recording listens itself


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [776, 1000])
def test_what_lies_beside_is_neither_read_nor_written(columns, form):
    rows, depth, dtype = 1000, 1496, torch.bfloat16
    x, weight, bias = operands(rows, columns, depth, dtype, bias=True)
    wide = [torch.full((len(m) + 1, depth + 72), torch.nan, dtype=dtype, device="cuda") for m in (x, weight)]
    inside = [w[:-1, 8 : 8 + depth].copy_(m) for w, m in zip(wide, (x, weight), strict=True)]
    around = empty(rows + 2, columns + 304, dtype).fill_(torch.nan)
    out = around[1:-1, 16 : 16 + columns]
    filled(out, inside[0], inside[1], bias, None, form).fill_(torch.nan)
    assert around.isnan().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("columns", "padded"), [(1, 16), (501, 512), (1493, 1504), (250, 256)])
def test_a_weight_of_fewer_rows_leaves_zeros_behind(columns, padded, bias):
    given = operands(1000, columns, 2816, torch.bfloat16, bias)
    around = empty(1000, padded + 304, torch.bfloat16).fill_(torch.nan)
    out = around[:, :padded]
    product_hopper(Product(*given, out))
    assert_within_error_rule(out[:, :columns].contiguous(), reference, (*given, None, None, None))
    assert torch.equal(out[:, columns:], torch.zeros_like(out[:, columns:]))
    assert around[:, padded:].isnan().all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ranks", [(501, 512, 501), (512, 501, 397), (501, 397, 384), (501, 397, 1000)])
@pytest.mark.parametrize("rows", [6000, 2900])
@pytest.mark.parametrize("down_bias", [False, True])
def test_streamed_mlp_that_keeps_its_copies(gated, ranks, rows, down_bias):
    """Whatever tile would be chosen, with a residual or without."""
    shape = {"width": 2816, "out_features": 1024, "gated": gated, "activation": "silu", "strategy": "streamed"}
    given = mlp_arguments(1, rows, 1024, ranks=ranks, dtype=torch.bfloat16, down_bias=down_bias, **shape)
    residual = random(1, rows, 1024, dtype=torch.bfloat16)
    kept = []

    def keeping_copies(mlp, rows, elements, target):
        kept.append(min(mlp_tiles.Sizes.of(mlp).keeping_copies(rows, 12 << 20)))
        return kept[-1]

    for added in (None, residual):
        arguments = (*given[:RESIDUAL], added, *given[RESIDUAL + 1 :])
        arguments = tuple(a.cuda() if isinstance(a, Tensor) else a for a in arguments)
        with patch.object(mlp_gpu, "tile_of", keeping_copies):
            result = ops.mlp(*arguments)
        assert_within_error_rule(result, mlp_reference, arguments)
    assert len(kept) == 2


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ranks", [(512, 256, 384), (501, 260, 397), (512, 397, 260)])
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
@pytest.mark.parametrize("rank", [512, 501])
@pytest.mark.parametrize("workspace_bytes", [48 << 20, 24 << 20])
def test_streamed_mlp_with_residual(gated, rank, workspace_bytes):
    """The residual joins the last product, also where ranges of the hidden layer are summed."""
    shape = {"width": 2816, "out_features": 2048, "gated": gated, "activation": "silu", "strategy": "streamed"}
    given = mlp_arguments(
        1, 9000, 1024, ranks=(rank,) * 3, dtype=torch.bfloat16, workspace_bytes=workspace_bytes, **shape
    )
    residual = random(1, 9000, 2048, dtype=torch.bfloat16)
    given = (*given[:RESIDUAL], residual, *given[RESIDUAL + 1 :])
    arguments = tuple(a.cuda() if isinstance(a, Tensor) else a for a in given)
    with patch.object(workspace, "multiply", wraps=workspace.multiply) as multiplied:
        result = ops.mlp(*arguments)
    assert multiplied.called
    assert_within_error_rule(result, mlp_reference, arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, *sorted(ACTIVATIONS)])
@pytest.mark.parametrize("columns", [776, 2816])
def test_nothing_spills(columns, activation, bias, form):
    """With the tests of cross-compilation this is seen under every Triton that is known."""
    out = empty(128, columns, torch.bfloat16)
    given = operands(128, columns, 1024, torch.bfloat16, bias)
    with one_launch() as launches:
        product_hopper(Product(*given, out), activation, *beside_of(form, out, out))
    assert launches[0].compiled.n_spills == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, *sorted(ACTIVATIONS)])
def test_nothing_spills_where_a_product_gates(activation, bias):
    out = empty(128, 2816, torch.bfloat16)
    given, other = (operands(128, 2816, 1024, torch.bfloat16, bias) for _ in range(2))
    with one_launch() as launches:
        product_hopper(Product(*given, out), activation, Product(*other, out))
    assert launches[0].compiled.n_spills == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [384, 4096])
def test_nothing_spills_where_heads_are_rotated(columns, bias):
    out = empty(128, columns, torch.bfloat16)
    cos, sin = (random(128, 128, dtype=torch.bfloat16).cuda() for _ in range(2))
    with one_launch() as launches:
        product_hopper(Product(*operands(128, columns, 1024, torch.bfloat16, bias), out), rotation=Rotation(cos, sin))
    assert launches[0].compiled.n_spills == 0
