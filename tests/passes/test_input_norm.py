"""A norm whose input is the residual of the operator behind it becomes the operator's own; other norms stay."""

import operator
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import layer_norm, linear, relu, rms_norm

from flashsvd_compile import ops
from flashsvd_compile.kernels.target import KNOWN
from flashsvd_compile.passes import few_rows, input_norm

from .builder import Rewritten, rewritten, tensor
from .test_residual import ATTENTION, MLP, REGIONS, X, attention, low_rank, mlp
from .test_workspace import compiled_bound

WEIGHT, BIAS = tensor(32, seed=7), tensor(32, seed=8)


def spelled_rms(x, weight, bias):
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def spelled_layer(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * weight + bias


SPELLINGS: dict[str, Callable] = {
    "rms": lambda x, weight, bias: rms_norm(x, (32,), weight, 1e-6),
    "rms without weight": lambda x, weight, bias: rms_norm(x, (32,)),
    "layer": lambda x, weight, bias: layer_norm(x, (32,), weight, bias, 1e-5),
    "layer without bias": lambda x, weight, bias: layer_norm(x, (32,), weight),
    "spelled rms": spelled_rms,
    "spelled layer": spelled_layer,
    "1 + weight": lambda x, weight, bias: rms_norm(x, (32,), eps=1e-6) * (1 + weight),
}


def absorbed(result: Rewritten) -> list[str]:
    """Kinds of the norms that operators take."""
    calls = [node for node in result.module.graph.nodes if node.target in (ops.mlp, ops.attention)]
    assert calls, "the region itself is found"
    return [call.kwargs["x_norm"] for call in calls if "x_norm" in call.kwargs]


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_absorbed(spelling, region):
    compute, weights = REGIONS[region]

    def block(x, a, b, c, d, weight, bias):
        return x + compute(SPELLINGS[spelling](x, weight, bias), a, b, c, d)

    result = rewritten(block, X, *weights, WEIGHT, BIAS)
    assert absorbed(result) == ["layer" if "layer" in spelling else "rms"]
    operations = [node for node in result.module.graph.nodes if node.op in ("call_function", "call_method")]
    assert len(operations) <= 2, "the norm's own nodes are gone, except what makes its weight"
    result.assert_same_result()


def test_every_norm_of_a_model():
    def block(x, a, b, c, d, e, f, g, h, weight):
        for _ in range(2):
            x = x + attention(rms_norm(x, (32,), weight), a, b, c, d)
            x = x + mlp(rms_norm(x, (32,), weight), e, f, g, h)
        return rms_norm(x, (32,), weight)

    result = rewritten(block, X, *ATTENTION, *MLP, WEIGHT)
    assert absorbed(result) == ["rms"] * 4
    assert len(result.module.graph.find_nodes(op="call_function", target=rms_norm)) == 1
    result.assert_same_result()


def a_sum(x):
    return x + x.sin()


def a_scaled_tensor(x):
    return x * 1.5


@pytest.mark.parametrize("stream", [a_sum, a_scaled_tensor])
def test_a_stream_that_is_computed_like_norms_are(stream):
    """As in front of an MLP whose attention stays as it is, and behind an embedding that is scaled."""

    def function(x, a, b, c, d, weight):
        x = stream(x)
        return x + mlp(rms_norm(x, (32,), weight), a, b, c, d)

    result = rewritten(function, X, *MLP, WEIGHT)
    assert absorbed(result) == ["rms"]
    result.assert_same_result()


def used_again(x, a, b, c, d, weight):
    normed = rms_norm(x, (32,), weight)
    return x + mlp(normed, a, b, c, d) + normed


def other_residual(x, a, b, c, d, weight):
    return x.sin() + mlp(rms_norm(x, (32,), weight), a, b, c, d)


def no_residual(x, a, b, c, d, weight):
    return mlp(rms_norm(x, (32,), weight), a, b, c, d)


def over_rows(x, a, b, c, d, weight):
    return x + mlp(x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * weight, a, b, c, d)


def of_halves(x, a, b, c, d, weight):
    return x + mlp(rms_norm(x.unflatten(-1, (2, 16)), (16,)).flatten(-2) * weight, a, b, c, d)


def no_norm(x, a, b, c, d, weight):
    return x + mlp(x * weight, a, b, c, d)


def overwritten(x, a, b, c, d, weight):
    x = x.clone()
    normed = rms_norm(x, (32,), weight)
    x.mul_(2)
    return x + mlp(normed, a, b, c, d)


def overwritten_between_statistics(x, a, b, c, d, weight):
    variance = x.var(-1, unbiased=False, keepdim=True)
    x.mul_(2)
    return x + mlp((x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5) * weight, a, b, c, d)


KEPT = used_again, other_residual, no_residual, over_rows, of_halves, no_norm, overwritten
KEPT += (overwritten_between_statistics,)


@pytest.mark.parametrize("block", KEPT)
def test_kept(block):
    result = rewritten(block, X, *MLP, WEIGHT)
    assert absorbed(result) == []
    result.assert_same_result()


def test_a_weight_of_another_dtype_keeps_the_norm():
    def block(x, a, b, c, d, weight):
        normed = (rms_norm(x.float(), (32,)) * weight).to(torch.bfloat16)
        return x + mlp(normed, a, b, c, d)

    half = [value.bfloat16() for value in (X, *MLP)]
    assert absorbed(rewritten(block, *half, WEIGHT)) == []


def test_other_readers_of_a_norm_within():
    """A conversion that something else reads stays in the graph."""

    def block(x, a, b, c, d, weight):
        squares = x.pow(2)
        normed = x * torch.rsqrt(squares.mean(-1, keepdim=True) + 1e-6) * weight
        return x + mlp(normed, a, b, c, d), squares.sum()

    result = rewritten(block, X, *MLP, WEIGHT)
    assert absorbed(result) == ["rms"]
    result.assert_same_result()


SINGLE_ROW: dict[str, tuple] = {
    "mlp": (mlp, MLP, ops.mlp),
    "projection": (lambda x, a, b, c, d: low_rank(x, a, b) + c.sum() + d.sum(), ATTENTION, ops.packed_linear),
    "projections": (lambda x, a, b, c, d: (low_rank(x, a, b), low_rank(x, c, d)), ATTENTION, ops.packed_linear),
}


@pytest.mark.parametrize("region", SINGLE_ROW)
@pytest.mark.parametrize(
    ("rows", "device", "spelling", "expected"),
    [
        (1, "cuda", "rms", True),
        (1, "cuda", "spelled rms", True),
        (1, "cuda", "rms without weight", True),
        (1, "cuda", "layer", False),
        (1, "cpu", "rms", False),
    ],
)
def test_a_single_row_on_a_gpu(region, rows, device, spelling, expected):
    """Its first products take a root mean square norm in passing, whatever it is a norm of."""
    compute, weights, target = SINGLE_ROW[region]

    def block(x, weight, bias, a, b, c, d):
        return compute(SPELLINGS[spelling](x, weight, bias), a, b, c, d)

    result = rewritten(block, tensor(rows, 32), WEIGHT, BIAS, *weights, device=device)
    calls = [node for node in result.module.graph.nodes if node.target is target]
    kinds = [call.kwargs.get("x_norm", "none") for call in calls]
    assert ("rms" in kinds) == expected
    result.assert_same_result()


def test_two_rows_on_a_gpu_keep_their_norm():
    def block(x, weight, a, b, c, d):
        return mlp(rms_norm(x, (32,), weight), a, b, c, d)

    assert absorbed(rewritten(block, tensor(2, 32), WEIGHT, *MLP, device="cuda")) == []


@pytest.mark.parametrize(
    ("rows", "features", "dtype", "spelling", "expected"),
    [
        (2, 32, torch.bfloat16, "rms", True),
        (8, 32, torch.bfloat16, "spelled rms", True),
        (2, 32, torch.float16, "rms", False),
        (9, 32, torch.bfloat16, "rms", False),
        (2, 32, torch.bfloat16, "layer", False),
        (2, 36, torch.bfloat16, "rms", False),
        (2, 32, torch.float32, "rms", False),
    ],
)
@pytest.mark.parametrize("chip", ["sm_90", "sm_80"])
def test_several_rows_where_there_is_a_kernel_for_them(chip, rows, features, dtype, spelling, expected, monkeypatch):
    """On Hopper, of bfloat16, by factors whose rows begin at 16-byte boundaries."""
    monkeypatch.setattr(few_rows, "chip_of", lambda node: KNOWN[chip])
    monkeypatch.setattr(few_rows, "speaks_gluon", lambda target: target.name == "sm_90")
    spellings = SPELLINGS | {"rms": lambda x, weight, bias: rms_norm(x, (features,), weight, 1e-6)}

    def block(x, weight, bias, a, b, c, d):
        return mlp(spellings[spelling](x, weight, bias), a, b, c, d)

    shapes = [(rows, features), (features,), (features,), (8, features), (48, 8), (8, 48), (features, 8)]
    result = rewritten(block, *(tensor(*shape).to(dtype) for shape in shapes), device="cuda")
    assert absorbed(result) == (["rms"] if expected and chip == "sm_90" else [])


@pytest.mark.parametrize(("dense", "expected"), [("hidden", []), ("out", ["rms"])])
def test_a_norm_before_a_single_row_and_a_dense_projection(dense, expected):
    """The kernel normalises what goes into rank space, not what is multiplied with a whole weight."""

    def block(x, weight, a, b, c, d, into, out):
        x = rms_norm(x, (32,), weight)
        hidden = linear(x, into) if dense == "hidden" else low_rank(x, a, b)
        return linear(relu(hidden), out) if dense == "out" else low_rank(relu(hidden), c, d)

    whole = tensor(48, 32), tensor(32, 48)
    result = rewritten(block, tensor(1, 32), WEIGHT, *MLP, *whole, device="cuda", strategy="streamed")
    assert absorbed(result) == expected


def test_a_norm_before_a_norm_of_its_own():
    """A call that normalises already has no place for another one."""

    def block(x, a, b, c, d, weight, own):
        normed = rms_norm(x, (32,), weight)
        given = {"hidden_down": a, "hidden_up": b, "out_down": c, "out_up": d, "residual": x}
        return ops.mlp(x=normed, **given, x_norm="rms", x_norm_weight=own, x_norm_eps=1e-6)

    rewritten(block, X, *MLP, WEIGHT, BIAS).assert_same_result()


def test_a_norm_that_others_read_stays_before_a_single_row():
    def block(x, weight, a, b, c, d):
        normed = rms_norm(x, (32,), weight)
        return mlp(normed, a, b, c, d), normed

    assert absorbed(rewritten(block, tensor(1, 32), WEIGHT, *MLP, device="cuda")) == []


def test_a_layer_of_one_token_is_nothing_but_operators():
    """Without the attention to a cache between its projections."""

    def layer(x, weight, a, b, c, d, e, f, g, h):
        x = x + low_rank(low_rank(rms_norm(x, (32,), weight), a, b).sin(), c, d)
        return x + mlp(rms_norm(x, (32,), weight), e, f, g, h)

    result = rewritten(layer, tensor(1, 32), WEIGHT, *ATTENTION, *MLP, device="cuda")
    calls = [node.target for node in result.module.graph.nodes if node.op in ("call_function", "call_method")]
    assert [target for target in calls if target in (ops.packed_linear, ops.mlp)] == [
        ops.packed_linear,
        ops.packed_linear,
        ops.mlp,
    ]
    assert len(calls) == 4, "all but the operators is sin"
    result.assert_same_result()


def test_cross_attention_keeps_the_norm_of_its_queries():
    def block(x, context, a, b, c, d, weight):
        normed = rms_norm(x, (32,), weight)
        q, k, v = (
            linear(linear(source, a), b).unflatten(-1, (4, 8)).transpose(1, 2) for source in (normed, context, context)
        )
        heads = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + linear(linear(heads, c), d)

    result = rewritten(block, X, tensor(2, 9, 32), *ATTENTION, WEIGHT)
    assert absorbed(result) == []
    result.assert_same_result()


def test_on_a_gpu_an_mlp_may_take_most_of_what_its_normed_stream_took():
    def block(x, a, b, c, d, weight):
        return x + mlp(rms_norm(x, (32,), weight, 1e-6), a, b, c, d)

    x = tensor(64, 16, 32)

    def workspace(**options):
        result = rewritten(block, x, *MLP, WEIGHT, device="cuda", strategy="streamed", **options)
        (call,) = (node for node in result.module.graph.nodes if node.target is ops.mlp)
        return call.kwargs["workspace_bytes"]

    assert workspace() - workspace(disable=["input_norm"]) == x.nbytes * 15 // 16
    assert workspace(memory_budget=4096) == 4096


@pytest.mark.parametrize(("rank", "grows"), [(256, False), (264, True)])
def test_on_a_gpu_so_may_attention_whose_rank_space_passes_through_memory(rank, grows):
    """Lower ranks stay on chip, and the input is normalised as a whole."""
    x, weights = tensor(2, 64, 320), (tensor(rank, 320), tensor(320, rank), tensor(4, 320), tensor(320, 4))

    def block(x, down, up, out_down, out_up, weight):
        return x + attention(rms_norm(x, (320,), weight, 1e-6), down, up, out_down, out_up)

    def workspace(**options):
        result = rewritten(block, x, *weights, tensor(320), device="cuda", strategy="streamed", **options)
        (call,) = (node for node in result.module.graph.nodes if node.target is ops.attention)
        return call.kwargs["workspace_bytes"]

    assert workspace() - workspace(disable=["input_norm"]) == grows * x.nbytes * 15 // 16
    assert workspace(memory_budget=4096) == 4096


@pytest.mark.parametrize("rows", [2, 77, 5000])
def test_most_of_a_stream_whose_size_is_dynamic(rows):
    x = torch.empty(rows, 3)
    bound = compiled_bound(lambda graph, stream: input_norm._larger(graph, 1000, stream), x)
    assert bound == 1000 + x.numel() // 16 * 15 * x.itemsize


def test_disabled():
    def block(x, a, b, c, d, weight):
        return x + mlp(rms_norm(x, (32,), weight), a, b, c, d)

    assert absorbed(rewritten(block, X, *MLP, WEIGHT, disable=["input_norm"])) == []


def test_a_post_norm_model_is_left_alone():
    def block(x, a, b, c, d, weight):
        return rms_norm(operator.add(x, linear(relu(x), weight)) + mlp(x, a, b, c, d), (32,))

    assert absorbed(rewritten(block, X, *MLP, tensor(32, 32))) == []


CLIPPED: dict[str, Callable] = {
    "before the weight": lambda x, weight: (
        (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).clamp(-5, 5) * weight
    ),
    "behind the weight": lambda x, weight: rms_norm(x, (32,), weight, 1e-6).clamp(-300.0, 300.0),
    "of a layer norm": lambda x, weight: layer_norm(x, (32,)).clamp(-5, 5) * weight,
    "of the input": lambda x, weight: rms_norm(x.clamp(-1e12, 1e12), (32,), weight, 1e-6),
}


@pytest.mark.parametrize("spelling", CLIPPED)
def test_a_clip_around_the_norm_is_kept(spelling):
    """It shows where one feature is much larger than the others, or a weight large."""

    def block(x, a, b, c, d, weight):
        return x + mlp(CLIPPED[spelling](x, weight), a, b, c, d)

    x = X.clone()
    x[..., 3] *= 1e3
    result = rewritten(block, x, *MLP, 100 * WEIGHT)
    assert absorbed(result) == []
    result.assert_same_result()
