"""Each family of transformers: which regions are rewritten, and that the answer stays right."""

import pytest

from benchmarks.zoo import FAMILIES
from flashsvd_compile.report import RefusalReason

from .compiled import Compiled, assert_as_right_as_unfused, factored

BATCH, LENGTH = 2, 9

# What the rules do not cover yet: attentions that are rewritten, and the reason given for the others.
PARTLY = {
    "StableLM": (0, RefusalReason.UNSUPPORTED_ATTENTION),  # heads are split up and normalised one by one
}
# In float64 these are no reference for a row that is masked completely: their softmax is in float32, where the finite
# level of their mask is -inf.
WITHOUT_LEFT_PADDING = {"Gemma 2"}
WHOLLY = [name for name in FAMILIES if name not in PARTLY]


@pytest.mark.parametrize("name", WHOLLY)
def test_every_attention_and_mlp_is_rewritten(name):
    """Right and left padding share one graph; models without a mask ignore both."""
    family, compiled = FAMILIES[name], Compiled(factored(name))
    for padding in ("right",) if name in WITHOUT_LEFT_PADDING else ("right", "left"):
        assert_as_right_as_unfused(name, compiled, family.inputs(BATCH, LENGTH, padding))
    report = compiled.report
    assert (report.count("attention"), report.count("mlp")) == (family.attentions, family.mlps)
    assert report.refusals == []


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "Mistral", "Gemma 2", "T5"])
def test_models_run_without_a_mask(name):
    family, compiled = FAMILIES[name], Compiled(factored(name))
    assert_as_right_as_unfused(name, compiled, family.inputs(BATCH, LENGTH, "none"))
    report = compiled.report
    assert (report.count("attention"), report.count("mlp")) == (family.attentions, family.mlps)
    assert report.refusals == []


@pytest.mark.parametrize("name", PARTLY)
def test_the_rest_of_a_family_is_right_and_says_what_is_missing(name):
    family, compiled = FAMILIES[name], Compiled(factored(name))
    assert_as_right_as_unfused(name, compiled, family.inputs(BATCH, LENGTH, "right"))
    attentions, reason = PARTLY[name]
    report = compiled.report
    assert (report.count("attention"), report.count("mlp")) == (attentions, family.mlps)
    assert {refusal.reason for refusal in report.refusals} == {reason}
    assert report.count("linear") > 0
