"""Soft caps between scores and mask: every spelling, and what is left alone."""

import pytest
import torch

from flashsvd_compile import RefusalReason

from .builder import rewritten, tensor
from .test_attention_rule import ALL, BATCH, BIAS, HEADS, LENGTH, X, assert_whole_region, attention

CAP = 5.0


def product(q, k):
    return q @ k.transpose(2, 3)


SPELLINGS = {
    "divided, multiplied": (lambda s: torch.tanh(s * 0.25 / CAP) * CAP, 0.25),
    "as a method": (lambda s: CAP * (s * 0.25).div(CAP).tanh(), 0.25),
    "by the inverse": (lambda s: CAP * torch.tanh(s * (0.25 / CAP)), 0.25),
    "in float32": (lambda s: (torch.tanh(s.float() / CAP) * CAP).to(torch.float32), 1.0),
    "in two factors": (lambda s: 2.5 * (2.0 * torch.tanh(s / CAP)), 1.0),
    "of another size inside": (lambda s: CAP * torch.tanh(s * 0.1), 0.5),
    "negative inside": (lambda s: CAP * torch.tanh(s / -CAP), -1.0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(spelling):
    capped, scale = SPELLINGS[spelling]
    kwargs = assert_whole_region(
        rewritten(attention(core=lambda q, k, v: torch.softmax(capped(product(q, k)), -1) @ v), X, *ALL)
    )
    assert kwargs["softcap"] == pytest.approx(CAP)
    assert kwargs.get("scale", 1.0) == pytest.approx(scale)


def test_a_bare_tanh_caps_at_one():
    core = lambda q, k, v: torch.tanh(product(q, k)).softmax(-1) @ v  # noqa: E731
    assert assert_whole_region(rewritten(attention(core=core), X, *ALL))["softcap"] == 1.0


def test_scaled_queries_are_scaled_before_the_cap():
    core = lambda q, k, v: (CAP * torch.tanh(product(q * 0.5, k) / CAP)).softmax(-1) @ v  # noqa: E731
    kwargs = assert_whole_region(rewritten(attention(core=core), X, *ALL))
    assert (kwargs["scale"], kwargs["softcap"]) == (0.5, CAP)


VISIBLE = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
MASKS = {
    "added": (lambda s, mask: s + mask, BIAS),
    "added in front": (lambda s, mask: mask + s, BIAS),
    "filled": (lambda s, mask: s.masked_fill(~mask, float("-inf")), VISIBLE.expand(BATCH, 1, LENGTH, LENGTH)),
}


@pytest.mark.parametrize("spelling", MASKS)
def test_a_mask_after_the_cap(spelling):
    masked, mask = MASKS[spelling]

    def function(x, mask, a, b, c, d, e, f, g, h):
        def core(q, k, v):
            return masked(CAP * torch.tanh(product(q, k) / CAP), mask).softmax(-1) @ v

        return attention(core=core)(x, a, b, c, d, e, f, g, h)

    assert "mask" in assert_whole_region(rewritten(function, X, mask, *ALL))


def assert_left_alone(function, *inputs, reason=RefusalReason.UNSUPPORTED_ATTENTION):
    result = rewritten(function, *inputs)
    assert result.count("attention") == 0
    assert result.count("linear") == 4
    assert result.reasons == [reason]
    result.assert_same_result()


NO_CAPS = {
    "twice": lambda s: torch.tanh(torch.tanh(s)),
    "negative outside": lambda s: -CAP * torch.tanh(s / CAP),
    "clamped": lambda s: s.clamp(-CAP, CAP),
    "sigmoid": lambda s: CAP * torch.sigmoid(s / CAP),
    "a cap for each head": lambda s: torch.tanh(s) * tensor(1, HEADS, 1, 1),
    "shifted": lambda s: torch.tanh(s + 1.0),
}


@pytest.mark.parametrize("spelling", NO_CAPS)
def test_what_is_no_cap(spelling):
    core = lambda q, k, v: NO_CAPS[spelling](product(q, k)).softmax(-1) @ v  # noqa: E731
    assert_left_alone(attention(core=core), X, *ALL)


def test_uncapped_scores_with_another_user():
    core = lambda q, k, v: (lambda s: (s + torch.tanh(s)).softmax(-1) @ v)(product(q, k))  # noqa: E731
    assert_left_alone(attention(core=core), X, *ALL, reason=RefusalReason.OTHER_USER)


@pytest.mark.parametrize("where", ["before the cap", "between the cap and its factor"])
def test_a_mask_inside_of_the_cap(where):
    def function(x, mask, a, b, c, d, e, f, g, h):
        def core(q, k, v):
            scores = product(q, k)
            capped = torch.tanh(scores + mask) if where == "before the cap" else torch.tanh(scores) + mask
            return (CAP * capped).softmax(-1) @ v

        return attention(core=core)(x, a, b, c, d, e, f, g, h)

    assert_left_alone(function, X, BIAS, *ALL)
