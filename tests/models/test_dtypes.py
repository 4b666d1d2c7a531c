"""Half precision, with and without parts that the model computes in float32."""

import pytest
import torch

from benchmarks.zoo import FAMILIES

from .compiled import Compiled, assert_as_right_as_unfused, factored


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("BERT", torch.bfloat16),
        ("ModernBERT", torch.bfloat16),
        ("Llama", torch.float16),
        ("Qwen3", torch.bfloat16),
        ("Gemma 3", torch.float16),
        ("Gemma 2", torch.bfloat16),
    ],
)
def test_half_precision(name, dtype):
    """ModernBERT rotates in float32, norms of inputs, queries and keys are in float32, Gemma 2 caps its scores."""
    family, compiled = FAMILIES[name], Compiled(factored(name, dtype))
    assert_as_right_as_unfused(name, compiled, family.inputs(2, 9, "right"), dtype)
    assert compiled.report.count("attention") == family.attentions
    assert compiled.report.count("mlp") == family.mlps


def test_double_precision_is_left_to_the_inner_backend():
    family, compiled = FAMILIES["BERT"], Compiled(factored("BERT", torch.float64))
    assert_as_right_as_unfused("BERT", compiled, family.inputs(2, 9, "right"), torch.float64)
    assert compiled.report.matches == []
    assert {refusal.reason for refusal in compiled.report.refusals} == {"unsupported_dtype"}
