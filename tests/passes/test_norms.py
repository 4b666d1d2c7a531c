"""Norms of queries and keys between projection and scores: every spelling, and what is left alone."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional
from torch.nn.functional import linear, scaled_dot_product_attention

from flashsvd_compile import RefusalReason, rewrite
from tests.ops.accuracy import assert_within_error_rule

from .builder import rewritten, tensor
from .capture import dynamo, exported

BATCH, LENGTH, HEADS, DIM = 2, 6, 4, 8
WIDTH = HEADS * DIM
EPS = 1e-5
X = tensor(BATCH, LENGTH, WIDTH)
Q, K, V, OUT = ((tensor(rank, WIDTH, seed=rank), tensor(WIDTH, rank, seed=10 + rank)) for rank in (3, 5, 6, 7))
WEIGHT, BIAS = tensor(DIM, seed=20) + 1, tensor(DIM, seed=21)
OF_HEADS, OF_HEADS_BIAS = tensor(HEADS, DIM, seed=22) + 1, tensor(HEADS, DIM, seed=23)
OF_ALL, OF_ALL_BIAS = OF_HEADS.flatten(), OF_HEADS_BIAS.flatten()
OPERATOR = torch.ops.flashsvd.attention_v5.default


def low_rank(x, down, up):
    return linear(linear(x, down), up)


def apart(y):
    return y.view(BATCH, LENGTH, HEADS, DIM)


def joined(heads):
    return heads.transpose(1, 2).reshape(BATCH, LENGTH, WIDTH)


def per_head(norm_q, norm_k):
    """Self-attention whose queries and keys, ``[batch, len, heads, dim]``, are normalised with one weight and bias."""

    def function(x, w, b, qd, qu, kd, ku, vd, vu, od, ou):
        q, k, v = (apart(low_rank(x, down, up)) for down, up in ((qd, qu), (kd, ku), (vd, vu)))
        q, k = norm_q(q, w, b), norm_k(k, w, b)
        heads = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return low_rank(joined(heads), od, ou)

    return function


def whole(norm_q, norm_k):
    """The same for norms of ``[batch, len, heads * dim]``."""

    def function(x, w, b, qd, qu, kd, ku, vd, vu, od, ou):
        q, k, v = (low_rank(x, down, up) for down, up in ((qd, qu), (kd, ku), (vd, vu)))
        q, k, v = (apart(y).transpose(1, 2) for y in (norm_q(q, w, b), norm_k(k, w, b), v))
        return low_rank(joined(scaled_dot_product_attention(q, k, v)), od, ou)

    return function


def call_of(result):
    assert result.count("attention") == 1, result.report
    assert result.count("linear") == 0
    result.assert_same_result()
    (node,) = result.module.graph.find_nodes(op="call_function", target=OPERATOR)
    return node.kwargs


def call_within_error_rule(function, inputs, capture=dynamo):
    """The one operator call that the graph becomes; its result errs no more than the rule allows."""
    captured = capture(function, *inputs)
    with torch.no_grad():
        report = rewrite(captured.module)
    assert (report.count("attention"), report.count("linear")) == (1, 0), report
    assert_within_error_rule(captured.module(*captured.inputs)[0], function, inputs)
    (node,) = captured.module.graph.find_nodes(op="call_function", target=OPERATOR)
    return node.kwargs


def rms(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def layer(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)


def in_float32(x):
    wide = x.to(torch.float32)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)


RMS = {
    "weight of what is rounded": (lambda x, w, b: w * in_float32(x).to(x.dtype), "w"),
    "weight, then rounded": (lambda x, w, b: (w * in_float32(x)).to(x.dtype), "w"),
    "one plus the weight": (lambda x, w, b: (in_float32(x) * (1.0 + w.float())).type_as(x), "w"),
    "weight in float32": (lambda x, w, b: (w.to(torch.float32) * in_float32(x)).to(x.dtype), "w"),
    "without weight": (lambda x, w, b: rms(x), ""),
    "weight and bias": (lambda x, w, b: b + rms(x) * w, "wb"),
    "bias alone": (lambda x, w, b: rms(x) + b, "b"),
    "divided by the root": (lambda x, w, b: x / torch.sqrt(x.square().mean(-1, True) + EPS) * w, "w"),
    "divided by a power": (lambda x, w, b: w * (x / (x.pow(2).mean(dim=-1, keepdim=True) + EPS).pow(0.5)), "w"),
    "scale times weight first": (lambda x, w, b: x * ((x * x).mean(-1, keepdim=True).add(EPS).rsqrt() * w), "w"),
    "a sum instead of a mean": (lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, True) / DIM + EPS) * w, "w"),
    "a mean that is made to fit": (lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1).unsqueeze(-1) + EPS) * w, "w"),
    "F.rms_norm": (lambda x, w, b: functional.rms_norm(x, (DIM,), w, EPS), "w"),
    "torch.rms_norm": (lambda x, w, b: torch.rms_norm(x, (DIM,), w, eps=EPS), "w"),
    "F.rms_norm without weight": (lambda x, w, b: functional.rms_norm(x, [DIM], eps=EPS), ""),
}
LAYER = {
    "squared difference": (lambda x, w, b: layer(x) * w + b, "wb"),
    "variance": (
        lambda x, w, b: (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS) * w,
        "w",
    ),
    "in float32": (lambda x, w, b: (w.to(torch.float32) * layer(x.to(torch.float32))).to(x.dtype), "w"),
    "F.layer_norm": (lambda x, w, b: functional.layer_norm(x, (DIM,), w, b, EPS), "wb"),
    "torch.layer_norm": (lambda x, w, b: torch.layer_norm(x, (DIM,), w, None, EPS), "w"),
    "F.layer_norm without weight": (lambda x, w, b: functional.layer_norm(x, (DIM,)), ""),
    "F.layer_norm in float32": (lambda x, w, b: functional.layer_norm(x.float(), (DIM,), eps=EPS).type_as(x), ""),
    "F.layer_norm, weight apart": (lambda x, w, b: functional.layer_norm(x, (DIM,), None, None, EPS) * w + b, "wb"),
}
SPELLINGS = {**{("rms", name): s for name, s in RMS.items()}, **{("layer", name): s for name, s in LAYER.items()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=" ".join)
def test_every_spelling_per_head(spelling, dtype):
    """In Dynamo's graph, where a dtype is a constant."""
    norm, affine = SPELLINGS[spelling]
    inputs = tuple(tensor.to(dtype) for tensor in (X, WEIGHT, BIAS, *Q, *K, *V, *OUT))
    kwargs = call_within_error_rule(per_head(norm, norm), inputs)
    for role in "qk":
        assert (kwargs[f"{role}_norm"], kwargs[f"{role}_norm_eps"]) == (spelling[0], EPS)
        assert (f"{role}_norm_weight" in kwargs, f"{role}_norm_bias" in kwargs) == ("w" in affine, "b" in affine)
        assert f"{role}_norm_whole" not in kwargs


@pytest.mark.parametrize(
    "spelling", [key for key in SPELLINGS if not key[1].startswith(("F.", "torch."))], ids=" ".join
)
def test_every_spelling_over_all_heads(spelling):
    norm, affine = SPELLINGS[spelling]
    if spelling[1] == "a sum instead of a mean":
        norm = lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, True) / WIDTH + EPS) * w  # noqa: E731
    kwargs = call_within_error_rule(whole(norm, norm), (X, OF_ALL, OF_ALL_BIAS, *Q, *K, *V, *OUT))
    assert (kwargs["q_norm"], kwargs["q_norm_whole"], kwargs["q_norm_eps"]) == (spelling[0], True, EPS)
    assert ("q_norm_weight" in kwargs, "q_norm_bias" in kwargs) == ("w" in affine, "b" in affine)


def mean_of_all(x):
    return x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + EPS)


ALL_HEADS = {
    "F.layer_norm of the features": lambda x, w, b: functional.layer_norm(x, (WIDTH,), w.flatten(), b.flatten()),
    "F.rms_norm of heads and features": lambda x, w, b: functional.rms_norm(apart(x), (HEADS, DIM), w, EPS),
    "a mean over heads and features": lambda x, w, b: mean_of_all(apart(x)) * w,
}


@pytest.mark.parametrize("spelling", ALL_HEADS)
def test_norms_over_all_heads(spelling):
    norm = ALL_HEADS[spelling]
    kwargs = call_of(rewritten(whole(norm, norm), X, OF_HEADS, OF_HEADS_BIAS, *Q, *K, *V, *OUT))
    assert kwargs["k_norm_whole"] is True


WEIGHTS = {
    "of a head": WEIGHT,
    "of a head, with dimensions of size 1": WEIGHT.view(1, 1, 1, DIM),
    "of all heads": OF_HEADS,
    "of all heads, with dimensions of size 1": OF_HEADS.view(1, 1, HEADS, DIM),
}


@pytest.mark.parametrize("shape", WEIGHTS)
def test_shapes_of_the_weight(shape):
    norm = lambda x, w, b: w * rms(x)  # noqa: E731
    call_of(rewritten(per_head(norm, norm), X, WEIGHTS[shape], BIAS, *Q, *K, *V, *OUT))


def test_heads_before_positions_with_a_weight_of_all_heads():
    def norm(x, w, b):
        return (rms(x.transpose(1, 2)) * w[:, None]).transpose(1, 2)

    call_of(rewritten(per_head(norm, norm), X, OF_HEADS, BIAS, *Q, *K, *V, *OUT))


def test_one_of_both_and_two_kinds():
    none = lambda x, w, b: x  # noqa: E731
    kwargs = call_of(rewritten(per_head(none, RMS["F.rms_norm"][0]), X, WEIGHT, BIAS, *Q, *K, *V, *OUT))
    assert "q_norm" not in kwargs
    assert kwargs["k_norm"] == "rms"
    kinds = per_head(LAYER["F.layer_norm"][0], RMS["without weight"][0])
    kwargs = call_of(rewritten(kinds, X, WEIGHT, BIAS, *Q, *K, *V, *OUT))
    assert (kwargs["q_norm"], kwargs["k_norm"]) == ("layer", "rms")


def test_a_weight_is_read_when_the_graph_runs():
    """A new checkpoint is seen: the weight is a node of the graph, also where one is added to it."""
    inputs = [X, WEIGHT, BIAS, *Q, *K, *V, *OUT]
    norm = RMS["one plus the weight"][0]
    result = rewritten(per_head(norm, norm), *inputs)
    call_of(result)
    inputs[1] = tensor(DIM, seed=30)
    torch.testing.assert_close(result.module(*inputs), per_head(norm, norm)(*inputs))


@pytest.mark.parametrize(("eps", "expected"), [(0.0, 0.0), (1e-12, 1e-12), (2**-23, 2**-23), (0.25, 0.25)])
def test_eps_is_found(eps, expected):
    norm = lambda x, w, b: x * torch.rsqrt(x.square().mean(-1, True) + eps) * w  # noqa: E731
    kwargs = call_of(rewritten(per_head(norm, norm), X, WEIGHT, BIAS, *Q, *K, *V, *OUT))
    assert kwargs.get("q_norm_eps", 0.0) == pytest.approx(expected, rel=1e-8)


OTHER_NORMS: dict[str, Callable] = {
    "a floor of the root": lambda x: x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-6),
    "a floor of the mean square": lambda x: x * x.pow(2).mean(-1, keepdim=True).clamp(min=1e-12).rsqrt(),
    "a ceiling of the mean square": lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).clamp(max=1e8).rsqrt(),
    "a clipped input": lambda x: torch.layer_norm(x.clamp(-1e4, 1e4), (DIM,)),
    "eps of nothing": lambda x: torch.rms_norm(x, (DIM,), None, 1e-18),
    "eps beside the root": lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-16),
    "nothing": lambda x: x * 0.0,
}


@pytest.mark.parametrize("name", OTHER_NORMS)
def test_what_only_looks_like_a_norm(name):
    """It differs at zero, where a padded row is, or far from 1. The projections are rewritten all the same."""
    norm = lambda x, w, b: OTHER_NORMS[name](x) * w  # noqa: E731
    padded = X.clone()
    padded[0, 3:] = 0.0
    for scale in (1.0, 1e-7, 1e6):
        result = rewritten(per_head(norm, norm), padded * scale, WEIGHT, BIAS, *Q, *K, *V, *OUT)
        assert result.count("attention") == 0
        result.assert_same_result()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_eps_that_is_left_to_the_library(dtype):
    """It is that of float32 for half precision too, in which the library computes."""
    norm = lambda x, w, b: torch.rms_norm(x, (DIM,), w)  # noqa: E731
    inputs = [tensor.to(dtype) for tensor in (X * 1e-3, WEIGHT, BIAS, *Q, *K, *V, *OUT)]
    result = rewritten(per_head(norm, norm), *inputs)
    (node,) = result.module.graph.find_nodes(op="call_function", target=OPERATOR)
    assert node.kwargs["q_norm_eps"] == pytest.approx(torch.finfo(torch.float32).eps, rel=1e-8)
    normed, wide = norm(inputs[0].unflatten(-1, (HEADS, DIM)), inputs[1], None), inputs[0].double()
    wide = wide.unflatten(-1, (HEADS, DIM))
    exact = wide * (wide.square().mean(-1, True) + node.kwargs["q_norm_eps"]).rsqrt() * inputs[1].double()
    torch.testing.assert_close(normed.double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=0)


def halves(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@pytest.mark.parametrize(
    ("capture", "spelling"),
    [
        (dynamo, ("rms", "weight of what is rounded")),
        (dynamo, ("layer", "F.layer_norm")),
        (exported, ("rms", "F.rms_norm")),
        (exported, ("layer", "squared difference")),
    ],
)
def test_a_norm_before_the_rotation(capture, spelling):
    norm, _ = SPELLINGS[spelling]

    def function(x, w, b, cos, sin, qd, qu, kd, ku, vd, vu):
        q, k, v = (apart(low_rank(x, down, up)) for down, up in ((qd, qu), (kd, ku), (vd, vu)))
        q, k = (halves(norm(t, w, b).transpose(1, 2), cos[:, None], sin[:, None]) for t in (q, k))
        return joined(scaled_dot_product_attention(q, k, v.transpose(1, 2)))

    tables = (tensor(1, LENGTH, DIM, seed=40), tensor(1, LENGTH, DIM, seed=41))
    kwargs = call_within_error_rule(function, (X, WEIGHT, BIAS, *tables, *Q, *K, *V), capture)
    assert {"cos", "sin", "q_norm", "k_norm"} <= kwargs.keys()


def test_a_packed_projection_whose_queries_are_normed():
    down, up = tensor(6, WIDTH, seed=50), tensor(3 * WIDTH, 6, seed=51)

    def function(x, w, down, up):
        packed = low_rank(x, down, up).view(BATCH, LENGTH, HEADS, 3, DIM)
        q, k, v = (packed[..., i, :] for i in range(3))
        q, k = functional.layer_norm(q, (DIM,), w), functional.layer_norm(k, (DIM,), w)
        return joined(scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))

    assert call_of(rewritten(function, X, WEIGHT, down, up))["q_norm"] == "layer"


KV_HEADS = 2
K_SHARED, V_SHARED = ((tensor(r, WIDTH, seed=r), tensor(KV_HEADS * DIM, r, seed=r)) for r in (5, 6))


def shared(norm_before, norm_after):
    """Two key heads for four query heads, with norms before and after the keys are repeated."""

    def function(x, w, qd, qu, kd, ku, vd, vu):
        q = low_rank(x, qd, qu).view(BATCH, LENGTH, HEADS, DIM).transpose(1, 2)
        k, v = (low_rank(x, d, u).view(BATCH, LENGTH, KV_HEADS, DIM) for d, u in ((kd, ku), (vd, vu)))
        k = norm_before(k, w).transpose(1, 2).repeat_interleave(2, dim=1)
        return joined(scaled_dot_product_attention(q, norm_after(k, w), v.transpose(1, 2).repeat_interleave(2, dim=1)))

    return function


def test_keys_shared_by_groups():
    function = shared(lambda k, w: rms(k) * w, lambda k, w: k)
    kwargs = call_of(rewritten(function, X, OF_HEADS[:KV_HEADS], *Q, *K_SHARED, *V_SHARED))
    assert (kwargs["num_heads"], kwargs["num_kv_heads"]) == (HEADS, KV_HEADS)


def test_repeated_keys_with_different_weights_are_refused():
    function = shared(lambda k, w: k, lambda k, w: rms(k) * w[:, None])
    assert_left_alone(rewritten(function, X, OF_HEADS, *Q, *K_SHARED, *V_SHARED), linears=3)


# What is no norm, or not one between projection and rotation


def assert_left_alone(result, linears=4, reason=RefusalReason.UNSUPPORTED_ATTENTION):
    assert result.count("attention") == 0
    assert result.count("linear") == linears
    assert reason in result.reasons
    result.assert_same_result()


def of_positions(x):
    return functional.layer_norm(x, (LENGTH, DIM))


NO_NORMS = {
    "over positions": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * w,
    "over the batch": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + EPS) * w,
    "over heads": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + EPS) * w,
    "over positions and features": lambda x, w, b: of_positions(x.transpose(1, 2)).transpose(1, 2),
    "unbiased variance": lambda x, w, b: (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, keepdim=True) + EPS) * w,
    "eps outside of the root": lambda x, w, b: x / (x.pow(2).mean(-1, True).sqrt() + 1e-3) * w,
    "length one": lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, True)) * w,
    "clamped": lambda x, w, b: x * x.pow(2).mean(-1, True).clamp(min=1e-2).rsqrt() * w,
    "clipped": lambda x, w, b: (rms(x) * w).clamp(-3.0, 3.0),
    "a function of the result": lambda x, w, b: torch.tanh(rms(x) * w),
    "centred but not scaled": lambda x, w, b: x - x.mean(-1, True),
    "not centred by its mean": lambda x, w, b: (x - x.mean(-1, True)) * torch.rsqrt(x.pow(2).mean(-1, True) + EPS),
    "another tensor's scale": lambda x, w, b: x * torch.rsqrt(X.view(x.shape).pow(2).mean(-1, True) + EPS),
    "added to itself": lambda x, w, b: x + rms(x),
    "a weight for each position": lambda x, w, b: rms(x) * tensor(1, LENGTH, 1, DIM),
    "twice": lambda x, w, b: rms(rms(x) * w),
    "two weights": lambda x, w, b: rms(x) * w * b,
    "a gain for each head": lambda x, w, b: rms(x) * tensor(HEADS, 1),
    "in float64": lambda x, w, b: (rms(x.double()) * w.double()).float(),
    "in bfloat16": lambda x, w, b: (rms(x.bfloat16()) * w.bfloat16()).float(),
    "a scale before it": lambda x, w, b: rms((x * 2.0).view(BATCH, LENGTH * HEADS, DIM)).view(x.shape),
}


@pytest.mark.parametrize("spelling", NO_NORMS)
def test_what_is_no_norm(spelling):
    norm = NO_NORMS[spelling]
    assert_left_alone(rewritten(per_head(norm, norm), X, WEIGHT, BIAS, *Q, *K, *V, *OUT))


def test_a_norm_after_the_rotation():
    def function(x, w, cos, sin, qd, qu, kd, ku, vd, vu):
        q, k, v = (apart(low_rank(x, d, u)).transpose(1, 2) for d, u in ((qd, qu), (kd, ku), (vd, vu)))
        q, k = (rms(halves(t, cos, sin)) * w for t in (q, k))
        return joined(scaled_dot_product_attention(q, k, v))

    tables = (tensor(1, 1, LENGTH, DIM, seed=40), tensor(1, 1, LENGTH, DIM, seed=41))
    assert_left_alone(rewritten(function, X, WEIGHT, *tables, *Q, *K, *V), linears=3)


def test_normed_values():
    def function(x, w, qd, qu, kd, ku, vd, vu):
        q, k, v = (apart(low_rank(x, d, u)).transpose(1, 2) for d, u in ((qd, qu), (kd, ku), (vd, vu)))
        return joined(scaled_dot_product_attention(q, k, rms(v) * w))

    result = rewritten(function, X, WEIGHT, *Q, *K, *V)
    assert_left_alone(result, linears=3)
    assert "values" in result.report.refusals[0].sentence


@pytest.mark.parametrize("which", ["mean of squares", "result"])
def test_an_intermediate_with_another_user_is_computed_twice(which):
    def function(x, w, qd, qu, kd, ku, vd, vu):
        q, k, v = (apart(low_rank(x, d, u)).transpose(1, 2) for d, u in ((qd, qu), (kd, ku), (vd, vu)))
        variance = q.pow(2).mean(-1, keepdim=True)
        normed = q * torch.rsqrt(variance + EPS) * w
        return joined(scaled_dot_product_attention(normed, k, v)), (variance if which != "result" else normed)

    result = rewritten(function, X, WEIGHT, *Q, *K, *V)
    assert (result.count("attention"), result.count("linear"), result.reasons) == (1, 1, [])
    result.assert_same_result()


def test_a_weight_that_is_overwritten():
    def function(x, w, qd, qu, kd, ku, vd, vu):
        q, k, v = (apart(low_rank(x, d, u)).transpose(1, 2) for d, u in ((qd, qu), (kd, ku), (vd, vu)))
        q = rms(q) * w
        w.mul_(2.0)
        return joined(scaled_dot_product_attention(q, k, v))

    assert_left_alone(rewritten(function, X, WEIGHT, *Q, *K, *V), linears=3, reason=RefusalReason.MUTATED)


def test_a_result_of_another_dtype():
    """Queries that stay in float32 would be rounded by the operator."""

    def function(x, w, qd, qu, kd, ku, vd, vu):
        q, k, v = (apart(low_rank(x, d, u)).transpose(1, 2) for d, u in ((qd, qu), (kd, ku), (vd, vu)))
        scores = rms(q.float()) @ rms(k.float()).transpose(2, 3)
        return joined(scores.softmax(-1).to(v.dtype) @ v)

    inputs = (t.bfloat16() for t in (X, WEIGHT, *Q, *K, *V))
    result = rewritten(function, *inputs)
    assert result.count("attention") == 0
    assert result.reasons == [RefusalReason.UNSUPPORTED_ATTENTION]
