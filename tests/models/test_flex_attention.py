"""flex_attention keeps its programs of masks and scores; the projections around it are rewritten."""

import copy

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import linear

from benchmarks.zoo import FAMILIES, LAYERS
from flashsvd_compile.report import RefusalReason
from tests.passes.builder import tensor

from .compiled import Compiled, assert_as_right_as_unfused, factored


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_llama(inner):
    model = copy.deepcopy(factored("Llama"))
    model.set_attn_implementation("flex_attention")  # pyright: ignore[reportCallIssue]
    compiled = Compiled(model, inner=inner)
    assert_as_right_as_unfused("Llama", compiled, FAMILIES["Llama"].inputs(2, 9, "right"))
    assert_left_alone(compiled, attentions=LAYERS)
    assert (compiled.report.count("mlp"), compiled.report.count("linear")) == (LAYERS, 4 * LAYERS)


def test_direct_use_with_a_program_for_the_scores():
    weights = [(tensor(3, 32, seed=i), tensor(32, 3, seed=10 + i)) for i in range(3)]

    def distance(score, batch, head, query, key):
        return score - 0.1 * (query - key).abs()

    def attend(x):
        q, k, v = (linear(linear(x, down), up).unflatten(-1, (4, 8)).transpose(1, 2) for down, up in weights)
        return flex_attention(q, k, v, score_mod=distance).transpose(1, 2).flatten(2)

    x, compiled = tensor(2, 16, 32), Compiled(attend, inner="aot_eager")
    torch.testing.assert_close(compiled(x=x), attend(x))
    assert_left_alone(compiled, attentions=1)
    assert compiled.report.count("linear") == 3


def assert_left_alone(compiled: Compiled, attentions: int) -> None:
    refusals = compiled.report.refusals
    assert [refusal.reason for refusal in refusals] == [RefusalReason.UNSUPPORTED_ATTENTION] * attentions
    assert all("flex_attention compiles itself" in refusal.sentence for refusal in refusals)
    assert compiled.report.count("attention") == 0
