"""Under autocast the operator's inputs are cast as autocast casts those of the layers it replaces."""

import pytest
import torch
from torch.nn import functional
from torch.nn.functional import linear, scaled_dot_product_attention

from flashsvd_compile import RefusalReason, explain, rewrite
from tests.ops.accuracy import FACTOR, in_float64, relative_error

from .builder import rewritten, tensor
from .capture import dynamo

X = tensor(2, 6, 32)
MLP = tensor(4, 32), tensor(48, 4), tensor(48), tensor(5, 48), tensor(32, 5)
ATTENTION = tensor(4, 32), tensor(32, 4), tensor(6, 32), tensor(32, 6)


def mlp(x, d1, u1, b1, d2, u2):
    return linear(linear(functional.gelu(linear(linear(x, d1), u1, b1)), d2), u2)


def self_attention(x, qd, qu, out_down, out_up):
    q, k, v = (linear(linear(x, qd), qu).unflatten(-1, (4, 8)).transpose(1, 2) for _ in range(3))
    heads = scaled_dot_product_attention(q, k, v)
    return linear(linear(heads.transpose(1, 2).flatten(2), out_down), out_up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "function", "weights"), [("mlp", mlp, MLP), ("attention", self_attention, ATTENTION)])
def test_regions_match_and_compute_in_the_autocast_dtype(kind, function, weights, dtype):
    with torch.autocast("cpu", dtype):
        result = rewritten(function, X, *weights)
        assert result.count(kind) == 1, result.report
        result.assert_same_result()
        assert result.module(X, *weights).dtype == dtype


def test_inputs_already_narrow_are_not_cast_again():
    with torch.autocast("cpu", torch.bfloat16):
        result = rewritten(mlp, X.bfloat16(), *MLP)
    assert result.count("mlp") == 1
    assert "x.to(" not in result.code
    assert "d1.to(" in result.code


BATCH, LENGTH, HEADS, DIM = X.shape[0], X.shape[1], 4, 8
TABLES = torch.cos(tensor(1, LENGTH, DIM // 2)).repeat(1, 1, 2), torch.sin(tensor(1, LENGTH, DIM // 2)).repeat(1, 1, 2)
WEIGHT = tensor(DIM, seed=20) + 1
FACTORS = tuple(tensor(*shape, seed=seed) for seed in range(3) for shape in ((4, 32), (32, 4)))


def heads_of(x, down, up):
    return linear(linear(x, down), up).view(BATCH, LENGTH, HEADS, DIM)


def rotated(heads, cos, sin):
    turned = torch.cat((-heads[..., DIM // 2 :], heads[..., : DIM // 2]), dim=-1)
    return heads * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def normed(heads, weight):
    """Qwen3's: the weight, float32, multiplies what is rounded."""
    wide = heads.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(heads.dtype)


def normed_wide(heads, weight):
    """As library norms are where autocast runs them in float32: nothing is rounded before the scores."""
    return weight * (heads.float() * torch.rsqrt(heads.float().pow(2).mean(-1, keepdim=True) + 1e-6))


def unnormed(heads, weight):
    return heads


def by_library(q, k, v):
    return scaled_dot_product_attention(q, k, v)


def capped(q, k, v):
    scores = 5.0 * torch.tanh(q @ k.transpose(2, 3) * 0.3 / 5.0)
    return functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def attention(norm, rotate, core):
    def function(x, weight, cos, sin, qd, qu, kd, ku, vd, vu):
        q, k, v = (heads_of(x, down, up) for down, up in ((qd, qu), (kd, ku), (vd, vu)))
        q, k = (norm(heads, weight).transpose(1, 2) for heads in (q, k))
        q, k = (rotated(heads, cos, sin) for heads in (q, k)) if rotate else (q, k)
        return core(q, k, v.transpose(1, 2)).transpose(1, 2).reshape(BATCH, LENGTH, HEADS * DIM)

    return function


def report_within_error_rule(function, *inputs):
    """The report on Dynamo's graph; the result errs no more than the rule allows, by what ``function`` errs here."""
    captured = dynamo(function, *inputs)
    with torch.no_grad():
        report = rewrite(captured.module)
    ours, plain = captured.module(*captured.inputs)[0], function(*inputs)
    exact = function(*in_float64(inputs))
    assert (ours.dtype, ours.shape) == (plain.dtype, plain.shape)
    assert relative_error(ours, exact) <= FACTOR * relative_error(plain, exact)
    return report


def reasons(report):
    return [refusal.reason for refusal in report.refusals]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("core", [by_library, capped])
@pytest.mark.parametrize(
    ("norm", "rotate"), [(unnormed, True), (normed, True), (normed, False), (normed_wide, True), (normed_wide, False)]
)
def test_norms_and_rotations_may_leave_float32_for_the_scores_to_narrow(norm, rotate, core, dtype):
    with torch.autocast("cpu", dtype):
        report = report_within_error_rule(attention(norm, rotate, core), X, WEIGHT, *TABLES, *FACTORS)
    assert (report.count("attention"), report.refusals) == (1, [])


@pytest.mark.parametrize("norm", [unnormed, normed_wide])
def test_queries_that_stay_float32_for_the_scores_are_left(norm):
    """Without autocast: the projections are in half precision, the scores are not."""

    def in_float32(q, k, v):
        return (q @ k.transpose(2, 3) * 0.3).softmax(-1).to(v.dtype) @ v

    factors = (factor.bfloat16() for factor in FACTORS)
    report = report_within_error_rule(attention(norm, True, in_float32), X.bfloat16(), WEIGHT, *TABLES, *factors)
    assert (report.count("attention"), reasons(report)) == (0, [RefusalReason.UNSUPPORTED_ATTENTION])
    assert report.count("linear") == 3


def masked(add):
    """Spelled-out attention; ``add(scores, mask, dtype)`` puts the mask on the scores."""

    def function(x, qd, qu, kd, ku, vd, vu, mask):
        q, k, v = (heads_of(x, down, up).transpose(1, 2) for down, up in ((qd, qu), (kd, ku), (vd, vu)))
        scores = add(q @ k.transpose(2, 3) * 0.3, mask, x.dtype)
        heads = functional.softmax(scores, dim=-1, dtype=x.dtype) @ v
        return heads.transpose(1, 2).reshape(BATCH, LENGTH, HEADS * DIM)

    return function


def of_level(level):
    """An additive mask of the dtype that the model has without autocast."""

    def add(scores, visible, dtype):
        low = torch.finfo(dtype).min if level is None else level
        return scores + torch.where(visible, torch.zeros((), dtype=dtype), low)

    return add


LEAST = of_level(None)
VISIBLE = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) > 0.4
VISIBLE[..., 0] = True
BLIND = VISIBLE.clone()
BLIND[0, :, 2] = False


@pytest.mark.parametrize("visible", [VISIBLE, BLIND], ids=["every query sees a key", "one query sees none"])
@pytest.mark.parametrize("cap", [False, True])
def test_a_float32_mask_of_least_numbers_is_narrowed(visible, cap):
    """A query that sees no key attends to all of them evenly, as in the model."""

    def add(scores, visible, dtype):
        return LEAST(5.0 * torch.tanh(scores / 5.0) if cap else scores, visible, dtype)

    with torch.autocast("cpu", torch.bfloat16):
        report = report_within_error_rule(masked(add), X, *FACTORS, visible)
    assert (report.count("attention"), report.refusals) == (1, [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_mask_of_minus_infinity_keeps_its_meaning(dtype):
    with torch.autocast("cpu", dtype):
        report = report_within_error_rule(masked(of_level(float("-inf"))), X, *FACTORS, VISIBLE)
    assert (report.count("attention"), report.refusals) == (1, [])


BIAS = tensor(1, HEADS, LENGTH, LENGTH)
BIASES = {
    "numbers that rounding changes": (torch.bfloat16, lambda scores, bias, dtype: scores + bias, BIAS),
    "half floats leave scores visible beside their least number": (torch.float16, LEAST, BLIND),
    "a level that leaves scores visible": (torch.bfloat16, of_level(-100.0), VISIBLE),
}


@pytest.mark.parametrize("bias", BIASES)
def test_a_float32_bias_that_narrowing_would_change_costs_the_region(bias):
    dtype, add, mask = BIASES[bias]
    with torch.autocast("cpu", dtype):
        report = report_within_error_rule(masked(add), X, *FACTORS, mask)
    assert (report.count("attention"), reasons(report)) == (0, [RefusalReason.UNKNOWN_MASK])
    assert report.count("linear") == 3


@pytest.mark.parametrize("inside", [False, True])
def test_weights_multiplied_outside_autocast_stay_multiplied(inside):
    """Their product is rounded once; both factors and what is between them would be, an error of 1.29 times that."""

    def function(x, up, down):
        weight = None if inside else up @ down
        with torch.autocast("cpu", torch.bfloat16):
            return linear(x, up @ down if weight is None else weight)

    given = tensor(4, 9, 32), tensor(24, 3), tensor(3, 32)
    report = explain(function, *given, options={"strategy": "streamed"})
    assert report.count("linear") == inside
    assert reasons(report) == ([] if inside else [RefusalReason.MODE_CHANGED])
