"""One compiled model, many batch sizes and lengths."""

import pytest
import torch

from benchmarks.zoo import FAMILIES

from .compiled import Compiled, assert_as_right_as_unfused, factored

PADDED = [
    ("BERT", "right"),
    ("GPT-2", "left"),
    ("Mistral", "left"),
    ("ModernBERT", "right"),
    ("Qwen3", "left"),
    ("Gemma 2", "none"),
]


@pytest.mark.parametrize(("name", "padding"), PADDED)
def test_one_graph_serves_every_length_and_batch(name, padding):
    family, compiled = FAMILIES[name], Compiled(factored(name), dynamic=True)
    for batch, length in ((2, 9), (2, 16), (3, 5), (5, 33), (4, 2)):
        assert_as_right_as_unfused(name, compiled, family.inputs(batch, length, padding))
    assert len(compiled.reports) == 1
    assert compiled.report.count("attention") == family.attentions


@pytest.mark.parametrize(
    ("name", "longest", "marked"), [("BERT", 512, True), ("ModernBERT", 4096, False), ("Llama", 4096, True)]
)
def test_one_graph_serves_the_extremes(name, longest, marked):
    """From two tokens to the longest text, from two items to many; BERT has learned no more than 512 positions."""
    family, compiled = FAMILIES[name], Compiled(factored(name), inner="aot_eager", dynamic=None if marked else True)
    for batch, length in ((2, 7), (64, 2), (2, longest), (64, 65), (3, 2)):
        inputs = family.inputs(batch, length, "right")
        tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        for tensor in tensors if marked else ():
            torch._dynamo.mark_dynamic(tensor, [0, 1])
        assert_as_right_as_unfused(name, compiled, inputs)
    assert len(compiled.reports) == 1
    assert compiled.report.count("attention") == family.attentions
    assert compiled.report.count("mlp") == family.mlps
    assert compiled.report.refusals == []


@pytest.mark.parametrize(("name", "padding"), PADDED)
def test_a_batch_of_one_costs_one_more_graph(name, padding):
    """Dynamo compiles sizes of 1 apart, because they broadcast."""
    family, compiled = FAMILIES[name], Compiled(factored(name), dynamic=True)
    for batch, length in ((2, 9), (1, 9), (1, 12), (3, 8)):
        assert_as_right_as_unfused(name, compiled, family.inputs(batch, length, padding))
    assert len(compiled.reports) == 2
    assert all(report.count("attention") == family.attentions for report in compiled.reports)


@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_a_single_token(name):
    family, compiled = FAMILIES[name], Compiled(factored(name))
    assert_as_right_as_unfused(name, compiled, family.inputs(1, 1, "right"))
    assert compiled.report.count("attention") == family.attentions


def test_marked_dimensions_are_dynamic():
    family, compiled = FAMILIES["BERT"], Compiled(factored("BERT"))
    for length in (8, 13, 64):
        inputs = family.inputs(2, length, "right")
        for tensor in inputs.values():
            torch._dynamo.mark_dynamic(tensor, 1)
        assert_as_right_as_unfused("BERT", compiled, inputs)
    assert len(compiled.reports) == 1


def test_static_shapes_become_dynamic_when_the_length_changes():
    family, compiled = FAMILIES["GPT-2"], Compiled(factored("GPT-2"))
    for length in (8, 13, 21, 34):
        assert_as_right_as_unfused("GPT-2", compiled, family.inputs(2, length, "left"))
    assert len(compiled.reports) == 2


def test_images_of_a_dynamic_batch():
    family, compiled = FAMILIES["ViT"], Compiled(factored("ViT"))
    for batch in (2, 3, 5):
        inputs = family.inputs(batch, 0, "none")
        torch._dynamo.mark_dynamic(inputs["pixel_values"], 0)
        assert_as_right_as_unfused("ViT", compiled, inputs)
    assert len(compiled.reports) == 1
    assert compiled.report.count("attention") == family.attentions
