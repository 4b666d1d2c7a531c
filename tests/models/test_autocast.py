"""Models of float32 parameters under autocast: rotations, norms and masks are wider than the products around them."""

import pytest
import torch

from benchmarks.zoo import FAMILIES
from flashsvd_compile.report import RefusalReason

from .compiled import Compiled, assert_as_right_as_unfused, factored


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen3", "OLMo 2", "Gemma 2", "Gemma 3", "ModernBERT", "Phi-3"])
def test_every_attention_and_mlp_is_rewritten(name, dynamic):
    """Rotation tables are float32, so is what Qwen3 and OLMo 2 norm and the mask that Gemma 2 adds."""
    family, compiled = FAMILIES[name], Compiled(factored(name), dynamic=dynamic)
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_right_as_unfused(name, compiled, family.inputs(2, 9, "right"))
    report = compiled.report
    assert (report.count("attention"), report.count("mlp")) == (family.attentions, family.mlps)
    assert report.refusals == []


@pytest.mark.parametrize("name", ["Qwen3", "Gemma 2"])
def test_through_inductor(name):
    family, compiled = FAMILIES[name], Compiled(factored(name), inner="inductor")
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_right_as_unfused(name, compiled, family.inputs(2, 9, "right"))
    assert compiled.report.count("attention") == family.attentions


@pytest.mark.parametrize("name", ["BLOOM", "MPNet"])
def test_a_float32_bias_on_narrow_scores_keeps_its_attention(name):
    family, compiled = FAMILIES[name], Compiled(factored(name))
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_right_as_unfused(name, compiled, family.inputs(2, 9, "right"))
    report = compiled.report
    assert (report.count("attention"), report.count("mlp")) == (0, family.mlps)
    assert report.count("linear") > 0
    assert {refusal.reason for refusal in report.refusals} == {RefusalReason.UNSUPPORTED_ATTENTION}
