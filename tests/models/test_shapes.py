"""One compiled model, many batch sizes and lengths."""

import copy
from functools import partial

import pytest
import torch
from torch.nn.functional import gelu, linear

from benchmarks.zoo import FAMILIES
from flashsvd_compile.report import RefusalReason
from tests.ops.accuracy import assert_within_error_rule
from tests.passes import builder

from .compiled import Compiled, assert_as_right_as_unfused, factored

sizes_unasked = partial(torch.fx.experimental._config.patch, backed_size_oblivious=True)  # pyright: ignore
"""Dynamo compiles no size of 1 apart, as it does by default."""

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


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_layers_compiled_apart(name, dynamic):
    """Rotation tables are inputs of a layer then, whose every size Dynamo gives a symbol first."""
    family, model = FAMILIES[name], copy.deepcopy(factored(name))
    whole = Compiled(model)
    for layer in model.get_submodule("layers").children():
        layer.compile(backend=whole.backend, dynamic=dynamic)
    for length in (9, 13):
        assert_as_right_as_unfused(name, model, family.inputs(3, length, "none"))
    assert {report.count("attention") for report in whole.reports} == {1}


@pytest.mark.parametrize(("name", "padding"), [("BERT", "right"), ("Mistral", "left"), ("Gemma 2", "none")])
def test_a_batch_of_one_costs_one_more_graph(name, padding):
    """Dynamo compiles sizes of 1 apart, because they broadcast."""
    family, compiled = FAMILIES[name], Compiled(factored(name), dynamic=True)
    for batch, length in ((2, 9), (1, 9), (1, 12), (3, 8)):
        assert_as_right_as_unfused(name, compiled, family.inputs(batch, length, padding))
    assert len(compiled.reports) == 2
    assert all(report.count("attention") == family.attentions for report in compiled.reports)


@pytest.mark.parametrize("name", [name for name, _ in PADDED])
def test_one_graph_serves_a_batch_of_one_too_if_dynamo_may_not_ask(name):
    """``backed_size_oblivious`` keeps Dynamo from taking a size of 1 for special; nothing of ours asks either.

    Without a padding mask transformers' decoders ask themselves, in Python.
    """
    family, compiled = FAMILIES[name], Compiled(factored(name), dynamic=True)
    with sizes_unasked():
        for batch, length in ((2, 9), (1, 9), (1, 2), (64, 2), (1, 300)):
            assert_as_right_as_unfused(name, compiled, family.inputs(batch, length, "right"))
    assert len(compiled.reports) == 1
    assert (compiled.report.count("attention"), compiled.report.count("mlp")) == (family.attentions, family.mlps)
    assert compiled.report.refusals == []


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_one_graph_serves_a_single_token_too_if_sizes_are_unbacked(inner, masked):
    """For attention that is spelled out: scaled_dot_product_attention itself asks whether there is one query."""

    def model(x, padding, down, up, hidden_down, hidden_up, out_down, out_up):
        q, k, v = (linear(linear(x, down), w).unflatten(-1, (4, 8)).transpose(1, 2) for w in (up, 2 * up, -up))
        scores = q @ k.transpose(2, 3) * 0.3
        if masked:
            scores = scores.masked_fill(~padding[:, None, None, :], float("-inf"))
        x = x + linear(linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), down), up)
        return x + linear(linear(gelu(linear(linear(x, hidden_down), hidden_up)), out_down), out_up)

    weights = [builder.tensor(*shape) for shape in ((8, 32), (32, 8), (9, 32), (64, 9), (7, 64), (32, 7))]
    compiled = Compiled(model, inner=inner)
    for batch, length in ((2, 9), (1, 9), (3, 1), (1, 1), (64, 2), (1, 4096)):
        x, padding = builder.tensor(batch, length, 32), torch.arange(length).expand(batch, -1) <= length // 2
        for value in (x, padding):
            torch._dynamo.decorators.mark_unbacked(value, [0, 1])
        inputs = (x, padding, *weights)
        assert_within_error_rule(compiled(*inputs), model, inputs)
    assert len(compiled.reports) == 1
    assert compiled.report.count("attention") == 1


def test_features_that_dynamo_takes_for_a_symbol_cost_the_region():
    """``backed_size_oblivious`` and a first text of one token: that length's symbol stands for other sizes of 1 too."""
    model = copy.deepcopy(factored("Llama"))
    model.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
    compiled = Compiled(model, dynamic=True)
    with sizes_unasked():
        assert_as_right_as_unfused("Llama", compiled, FAMILIES["Llama"].inputs(3, 1, "right"))
    assert RefusalReason.UNKNOWN_SIZE in {refusal.reason for refusal in compiled.report.refusals}


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
