"""Every way to mask scores reaches the operator as what it means, or costs the region."""

import operator

import pytest
import torch
from torch.nn import functional
from torch.nn.functional import linear, scaled_dot_product_attention

from flashsvd_compile import RefusalReason
from tests.ops.accuracy import assert_within_error_rule

from .builder import call, rewritten, tensor

BATCH, LENGTH, HEADS, DIM = 2, 6, 4, 8
WIDTH = HEADS * DIM
X = tensor(BATCH, LENGTH, WIDTH)
WEIGHTS = tensor(4, WIDTH), tensor(WIDTH, 4), tensor(WIDTH, WIDTH)
MIN, HALF_MIN = torch.finfo(torch.float32).min, torch.finfo(torch.float16).min


def masked_attention(mask_scores):
    """Spelled-out self-attention; ``mask_scores(scores, *masks)`` restricts it."""

    def function(x, down, up, out, *masks):
        q = linear(linear(x, down), up).view(BATCH, LENGTH, HEADS, DIM).transpose(1, 2)
        k, v = (linear(linear(x, down), up).view(BATCH, LENGTH, HEADS, DIM).transpose(1, 2) for _ in range(2))
        scores = mask_scores(q @ k.transpose(2, 3) * 0.3, *masks)
        return linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), out)

    return function


def run(mask_scores, *masks):
    attend = masked_attention(mask_scores)
    if len(masks) == 1:
        return rewritten(lambda x, a, b, c, mask: attend(x, a, b, c, mask), X, *WEIGHTS, *masks)
    if len(masks) == 2:
        return rewritten(lambda x, a, b, c, m, n: attend(x, a, b, c, m, n), X, *WEIGHTS, *masks)
    return rewritten(lambda x, a, b, c: attend(x, a, b, c), X, *WEIGHTS)


def arguments_of(result) -> set[str]:
    assert result.count("attention") == 1, result.report
    result.assert_same_result()
    (operator,) = result.module.graph.find_nodes(op="call_function", target=torch.ops.flashsvd.attention_v5.default)
    return set(operator.kwargs) & {"mask", "key_padding", "window_left", "window_right"}


PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
RANDOM = torch.rand(BATCH, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) > 0.4
RANDOM[..., 0] = True
INF = float("-inf")


STRUCTURED = {
    "padding, filled where it is not": (
        {"key_padding"}, lambda s, p: s.masked_fill(~p[:, None, None, :], INF), PADDING,
    ),
    "padding equal to 0": ({"key_padding"}, lambda s, p: s.masked_fill(p[:, None, None, :] == 0, INF), PADDING),
    "where padding": ({"key_padding"}, lambda s, p: torch.where(p[:, None, None, :], s, INF), PADDING),
    "causal, filled": ({"window_right"}, lambda s: s.masked_fill(~causal(), INF)),
    "causal, filled with the least number": ({"window_right"}, lambda s: s.masked_fill(~causal(), MIN)),
    "causal, filled with -1e9": ({"window_right"}, lambda s: s.masked_fill(~causal(), -1e9)),
    "where causal": ({"window_right"}, lambda s: torch.where(causal(), s, torch.full((), MIN))),
    "causal and padding in turn": (
        {"window_right", "key_padding"},
        lambda s, p: s.masked_fill(~causal(), INF).masked_fill(~p[:, None, None, :], INF),
        PADDING,
    ),
}  # fmt: skip


def causal():
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    return (j <= i)[None, None]


@pytest.mark.parametrize("spelling", STRUCTURED)
def test_structure_is_recovered_from_fills(spelling):
    wanted, mask_scores, *masks = STRUCTURED[spelling]
    assert arguments_of(run(mask_scores, *masks)) == wanted


DENSE = {
    "forbidden": (lambda s, m: s.masked_fill(m, INF), ~RANDOM),
    "forbidden, least number": (lambda s, m: s.masked_fill(m, MIN), ~RANDOM),
    "visible": (lambda s, m: torch.where(m, s, INF), RANDOM),
    "visible, least number": (lambda s, m: torch.where(m, s, MIN), RANDOM),
    "negated": (lambda s, m: s.masked_fill(~m, INF), RANDOM),
    "a row masked completely": (lambda s, m: s.masked_fill(m, MIN), torch.ones_like(RANDOM)),
    "padding, least number": (lambda s, p: s.masked_fill(~p[:, None, None, :], MIN), PADDING),
    "additive": (lambda s, m: s + m, torch.where(RANDOM, 0.0, MIN)),
}


FLOORS = {
    "max": lambda s: torch.max(s, torch.tensor(MIN)),
    "maximum": lambda s: torch.maximum(s, torch.full((), MIN)),
    "clamp": lambda s: s.clamp(min=MIN),
    "clamp_min": lambda s: torch.clamp_min(s, MIN),
}


@pytest.mark.parametrize("floor", FLOORS)
def test_scores_raised_to_the_least_number(floor):
    """A query that may see no key attends to all of them evenly."""
    rows_without_keys = torch.where(RANDOM, 0.0, INF)
    rows_without_keys[0, 1, 2] = INF
    assert arguments_of(run(lambda s, m: FLOORS[floor](s + m), rows_without_keys)) == {"mask"}
    assert arguments_of(run(lambda s, m: FLOORS[floor](s.masked_fill(m, INF)), torch.ones_like(RANDOM))) == {"mask"}
    assert arguments_of(run(lambda s: FLOORS[floor](s.masked_fill(~causal(), INF)))) == {"window_right"}
    assert arguments_of(run(FLOORS[floor])) == set()


@pytest.mark.parametrize("spelling", DENSE)
def test_other_fills_become_a_mask(spelling):
    mask_scores, mask = DENSE[spelling]
    assert arguments_of(run(mask_scores, mask)) == {"mask"}


def test_a_bias_and_a_fill_together():
    result = run(
        lambda s, b, p: (s + b).masked_fill(~p[:, None, None, :], INF), tensor(1, HEADS, LENGTH, LENGTH), PADDING
    )
    assert arguments_of(result) == {"mask", "key_padding"}


BIAS = tensor(1, HEADS, LENGTH, LENGTH)
TOGETHER = {
    "two biases": (lambda s, b, c: s + b + c, BIAS, tensor(LENGTH)),
    "a bias, then least numbers": (lambda s, b, m: (s + b).masked_fill(m, MIN), BIAS, torch.ones_like(RANDOM)),
    "a bias, then -inf": (lambda s, b, m: (s + b).masked_fill(m, INF), BIAS, ~RANDOM),
    "-inf, then a bias": (lambda s, m, b: s.masked_fill(m, INF) + b, ~RANDOM, BIAS),
    "two conditions": (lambda s, m, n: s.masked_fill(m, INF).masked_fill(n, INF), ~RANDOM, ~RANDOM.roll(1, 2)),
    "least numbers twice, raised": (
        lambda s, a, b: (s + a + b).clamp(min=MIN),
        torch.where(RANDOM.roll(1, 3), 0.0, MIN).index_fill(2, torch.tensor(2), MIN),
        torch.where(RANDOM, 0.0, MIN),
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", TOGETHER)
def test_two_masks_become_one(spelling):
    mask_scores, *masks = TOGETHER[spelling]
    assert arguments_of(run(mask_scores, *masks)) == {"mask"}


@pytest.mark.parametrize("bias", [(BATCH * HEADS, 1, LENGTH), (1, LENGTH, LENGTH), (LENGTH,)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_bias_that_baddbmm_adds(bias, masked):
    """Bloom's ALiBi."""

    def items_of(y):
        return y.view(BATCH, LENGTH, HEADS, DIM).transpose(1, 2).reshape(BATCH * HEADS, LENGTH, DIM)

    def function(x, down, up, out, bias, padding):
        q, k, v = (items_of(linear(linear(x, down), up)) for _ in range(3))
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=0.3).view(BATCH, HEADS, LENGTH, LENGTH)
        scores = scores.masked_fill(~padding[:, None, None, :], INF) if masked else scores
        weights = scores.softmax(-1).view(BATCH * HEADS, LENGTH, LENGTH)
        heads = torch.bmm(weights, v).view(BATCH, HEADS, LENGTH, DIM)
        return linear(heads.transpose(1, 2).reshape(BATCH, LENGTH, WIDTH), out)

    result = rewritten(function, X, *WEIGHTS, tensor(*bias, scale=2.0), PADDING)
    assert arguments_of(result) == ({"mask", "key_padding"} if masked else {"mask"})


def test_a_bias_on_raised_scores_that_are_raised_no_more():
    """Raised in between: neither the sum of the masks nor that sum raised is what the graph computes."""
    result = run(lambda s, a, b: torch.clamp(s + a, min=MIN) + b, torch.where(RANDOM, 0.0, INF), BIAS)
    assert result.count("attention") == 0
    result.assert_same_result()


def written_to(view):
    def filled_with_an_overwritten_number(scores):
        fill = torch.tensor(-1e9)
        call(operator.setitem, view(fill), ..., -1.0)
        return scores.masked_fill(~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), fill)

    return filled_with_an_overwritten_number


NOT_UNDERSTOOD = {
    "a fill that was overwritten": (RefusalReason.UNSUPPORTED_ATTENTION, written_to(lambda fill: fill)),
    "a fill overwritten through a view": (
        RefusalReason.UNSUPPORTED_ATTENTION, written_to(lambda fill: fill.view(1)[:1]),
    ),
    "a fill overwritten through one of several views": (
        RefusalReason.UNSUPPORTED_ATTENTION, written_to(lambda fill: torch.unbind(fill.view(1))[0]),
    ),
    "a fill that is not low": (RefusalReason.UNSUPPORTED_ATTENTION, lambda s, m: s.masked_fill(m, -5.0), ~RANDOM),
    "rows that -1e9 may fill": (RefusalReason.UNKNOWN_MASK, lambda s, m: s.masked_fill(m, -1e9), ~RANDOM),
    "a condition added": (RefusalReason.UNSUPPORTED_ATTENTION, lambda s, m: s + m, RANDOM),
    "scores raised to another number": (RefusalReason.UNSUPPORTED_ATTENTION, lambda s: s.clamp(min=-2.0)),
    "scores bounded on both sides": (RefusalReason.UNSUPPORTED_ATTENTION, lambda s: s.clamp(MIN, 0.1)),
    "two paddings": (
        RefusalReason.UNKNOWN_MASK,
        lambda s, p, r: s.masked_fill(~p[:, None, None], INF).masked_fill(~r[:, None, None], INF),
        PADDING,
        PADDING.flip(0),
    ),
    "a wider bias": (
        RefusalReason.UNSUPPORTED_ATTENTION, lambda s, b: (s.double() + b).float(), tensor(LENGTH, LENGTH).double(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_not_guessed(spelling):
    reason, mask_scores, *masks = NOT_UNDERSTOOD[spelling]
    result = run(mask_scores, *masks)
    assert result.count("attention") == 0
    assert result.count("linear") == 3
    assert result.reasons == [reason]
    result.assert_same_result()


def test_a_mask_that_makes_more_batch_items_out_of_one_is_refused():
    def function(x, down, up, mask):
        q = linear(linear(x, down), up).view(1, LENGTH, HEADS, DIM).transpose(1, 2)
        v = linear(linear(x, down), up).view(1, LENGTH, HEADS, DIM).transpose(1, 2).expand(BATCH, -1, -1, -1)
        k = linear(linear(x, down), up).view(1, LENGTH, HEADS, DIM).transpose(1, 2)
        return ((q @ k.mT + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)

    result = rewritten(function, X[:1], *WEIGHTS[:2], torch.where(RANDOM, 0.0, INF))
    assert result.count("attention") == 0
    result.assert_same_result()


def test_a_wide_mask_beside_half_precision_queries():
    def function(x, down, up, mask):
        q, k, v = (linear(linear(x, down), up).view(BATCH, LENGTH, HEADS, DIM).transpose(1, 2) for _ in range(3))
        return scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    half = [value.bfloat16() for value in (X, *WEIGHTS[:2])]
    result = rewritten(function, *half, tensor(BATCH, HEADS, LENGTH, LENGTH))
    assert result.count("attention") == 0
    assert result.reasons == [RefusalReason.UNKNOWN_MASK]


@pytest.mark.parametrize("mask_scores", [lambda s, m: s.masked_fill(m, INF), lambda s, m: s + m.half() * HALF_MIN])
def test_half_floats_are_too_narrow_for_rows_that_may_be_masked_completely(mask_scores):
    """Next to -65504 a score of a few units is not rounded away in float32, in which the operator computes."""
    attend = masked_attention(lambda s, m: mask_scores(s, m).clamp(min=HALF_MIN))
    half = [value.half() for value in (X, *WEIGHTS)]
    result = rewritten(lambda x, a, b, c, m: attend(x, a, b, c, m), *half, torch.ones_like(RANDOM))
    assert result.count("attention") == 0
    assert result.reasons == [RefusalReason.UNKNOWN_MASK]


def test_the_report_says_why_a_mask_stays_a_tensor():
    result = run(lambda s, m: s.masked_fill(~m, INF), RANDOM)
    assert "its mask stays a tensor: " in result.report.matches[0].reason
    assert result.report.matches[0].reason.endswith("is not a vector over the keys")
    result = run(lambda s, m: s + m, tensor(LENGTH, LENGTH))
    assert result.report.matches[0].reason.endswith("; its mask stays a tensor: no rule explains the mask's values")
    structured = run(lambda s: s.masked_fill(~causal(), INF))
    assert "mask" not in structured.report.matches[0].reason


def test_a_sink_beside_the_keys_is_refused():
    """GPT-OSS: a learned score takes its share of each query's attention."""

    def function(x, down, up, out, sinks):
        q, k, v = (linear(linear(x, down), up).view(BATCH, LENGTH, HEADS, DIM).transpose(1, 2) for _ in range(3))
        sinks = sinks.reshape(1, -1, 1, 1).expand(BATCH, -1, LENGTH, -1)
        weights = torch.cat((q @ k.mT * 0.3, sinks), dim=-1).softmax(-1)[..., :-1]
        return linear((weights @ v).transpose(1, 2).flatten(2), out)

    result = rewritten(function, X, *WEIGHTS, tensor(HEADS))
    assert result.count("attention") == 0
    assert result.reasons == [RefusalReason.UNSUPPORTED_ATTENTION]
    assert "sink" in result.report.refusals[0].sentence
    result.assert_same_result()


def test_a_softmax_over_the_queries_is_refused():
    result = run(lambda s: functional.softmax(s, dim=-2))
    assert result.count("attention") == 0
    result.assert_same_result()


NO_KEY_TOGETHER = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
"""Padding on the left: the first queries see no key where attention is causal, too."""
LOW = torch.zeros(BATCH, 1, 1, LENGTH).masked_fill(~NO_KEY_TOGETHER[:, None, None], MIN)
CAUSAL_GIVEN = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def causal_of(level):
    return torch.full((LENGTH, LENGTH), level).triu(1)


HIDING = {
    "where causal, least number; padding added": (lambda s, p: torch.where(causal(), s, MIN) + p, LOW),
    "both added": (lambda s, p: s + causal_of(MIN) + p, LOW),
    "both filled": (
        lambda s, p, c: s.masked_fill(~c, MIN).masked_fill(~p[:, None, None], MIN), NO_KEY_TOGETHER, CAUSAL_GIVEN,
    ),
    "both filled, the other way round": (
        lambda s, p, c: s.masked_fill(~p[:, None, None], MIN).masked_fill(~c, MIN), NO_KEY_TOGETHER, CAUSAL_GIVEN,
    ),
    "filled, one of them understood": (
        lambda s, p: s.masked_fill(~causal(), MIN).masked_fill(~p[:, None, None], MIN), NO_KEY_TOGETHER,
    ),
    "added, then filled": (lambda s, p, c: (s + p).masked_fill(~c, MIN), LOW, CAUSAL_GIVEN),
    "raised to the least number": (
        lambda s, p: torch.max(s.masked_fill(~causal(), INF) + p, torch.full((), MIN)), LOW.masked_fill(LOW < 0, INF),
    ),
    "one raised, then filled": (
        lambda s, p, c: torch.max(s + p, torch.full((), MIN)).masked_fill(~c, INF),
        LOW.masked_fill(LOW < 0, INF), CAUSAL_GIVEN,
    ),
    "-inf added, then filled": (lambda s, p: (s + causal_of(INF)).masked_fill(~p[:, None, None], MIN), NO_KEY_TOGETHER),
    "-inf filled, then chosen": (
        lambda s, p: torch.where(p[:, None, None], s.masked_fill(~causal(), INF), MIN), NO_KEY_TOGETHER,
    ),
    "-inf in a bias of each head, then filled": (
        lambda s, b, p: (s + b).masked_fill(~p[:, None, None], MIN),
        tensor(HEADS, LENGTH, LENGTH) + causal_of(INF), NO_KEY_TOGETHER,
    ),
    "-inf in one of two biases, then filled": (
        lambda s, b, p: (s + b + b[:1]).masked_fill(~p[:, None, None], MIN),
        tensor(HEADS, LENGTH, LENGTH) + causal_of(INF), NO_KEY_TOGETHER,
    ),
    "the least number, then -inf": (
        lambda s, p: (s + causal_of(MIN)).masked_fill(~p[:, None, None], INF),
        torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool),
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", HIDING)
def test_queries_that_see_no_key_by_two_masks_together(spelling):
    """They attend evenly to what the scores' least numbers leave, which is told as one mask."""
    mask_scores, *masks = HIDING[spelling]
    assert arguments_of(run(mask_scores, *masks)) == {"mask"}


def test_windows_together_stay_structure():
    """Every query sees itself by both."""

    def near():
        return torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :] < 3

    result = run(lambda s: s.masked_fill(~causal(), MIN).masked_fill(~near(), MIN))
    assert arguments_of(result) == {"window_left", "window_right"}


def test_an_opaque_mask_beside_a_bias_of_each_head():
    bias = tensor(HEADS, LENGTH, LENGTH)
    for spelling in (
        lambda s, b, m: (s + b).masked_fill(m, INF),
        lambda s, b, m: torch.where(m.logical_not(), s + b, INF),
    ):
        assert arguments_of(run(spelling, bias, ~RANDOM)) == {"mask"}


def test_several_masks_with_a_level_that_scores_are_not_lost_beside_are_refused():
    result = run(lambda s, p: s.masked_fill(~causal(), -1e9) + p, LOW)
    assert result.reasons == [RefusalReason.UNKNOWN_MASK]
    result.assert_same_result()


def test_widened_scores_filled_with_the_least_number_of_float32():
    """It is -inf to bfloat16, which would give zeros where all keys are hidden."""

    def function(x, down, up, out, hidden):
        q, k, v = (linear(linear(x, down), up).view(BATCH, LENGTH, HEADS, DIM).transpose(1, 2) for _ in range(3))
        scores = (q @ k.transpose(2, 3)).float().masked_fill(hidden, MIN)
        return linear((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2), out)

    hidden = ~PADDING[:, None, None] | torch.tensor([True, False])[:, None, None, None]
    result = rewritten(function, X.bfloat16(), *(weight.bfloat16() for weight in WEIGHTS), hidden)
    assert result.count("attention") == 1, result.report
    assert_within_error_rule(result.module(*result.inputs), function, result.inputs)


LEADING = {
    "windows of an item": (
        lambda s, m: (s.view(1, BATCH, HEADS, LENGTH, LENGTH) + m[None, :, None]).view_as(s),
        tensor(BATCH, LENGTH, LENGTH),
    ),
    "groups of heads, added": (
        lambda s, m: (s.view(BATCH, 2, 2, LENGTH, LENGTH) + m).view_as(s), tensor(1, 2, 1, LENGTH, LENGTH),
    ),
    "groups of heads, filled": (
        lambda s, m: s.view(BATCH, 2, 2, LENGTH, LENGTH).masked_fill(m, INF).view_as(s), ~RANDOM[:, 0][:, None],
    ),
    "items by heads": (
        lambda s, m: s.flatten(0, 1).masked_fill(m, INF).view_as(s), ~RANDOM.flatten(0, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", LEADING)
def test_masks_of_other_dimensions_than_batch_and_heads_are_refused(spelling):
    result = run(*LEADING[spelling])
    assert result.reasons == [RefusalReason.UNSUPPORTED_ATTENTION]
    result.assert_same_result()


def test_a_mask_of_one_head_in_three_dimensions_is_refused():
    def function(x, down, up, out, padding):
        q, k, v = (linear(linear(x, down), up) for _ in range(3))
        return linear((q @ k.mT).masked_fill(~padding[:, None], INF).softmax(-1) @ v, out)

    result = rewritten(function, X, *WEIGHTS, PADDING)
    assert result.reasons == [RefusalReason.UNSUPPORTED_ATTENTION]
    result.assert_same_result()
