"""What layers have in common is read, planned and searched once, and what they do not is not mixed up."""

from collections import Counter
from importlib import import_module

import pytest
import sympy
import torch
from sympy.core.cache import clear_cache
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from flashsvd_compile.options import RULES
from flashsvd_compile.passes import order
from flashsvd_compile.planner import plan_attention, plan_mlp

from .builder import rewritten, tensor

BATCH, LENGTH, HEADS, DIM = 2, 6, 2, 8
WIDTH, LAYERS = HEADS * DIM, 3
rewriting = import_module("flashsvd_compile.passes.rewrite")  # the package's own `rewrite` is the function
X = tensor(BATCH, LENGTH, WIDTH)
DOWN, UP, OTHER_DOWN, OTHER_UP = tensor(4, WIDTH), tensor(WIDTH, 4), tensor(5, WIDTH), tensor(WIDTH, 5)
PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)


def attend(x, down, up, mask):
    q, k, v = (linear(linear(x, down), up).view(BATCH, LENGTH, HEADS, DIM).transpose(1, 2) for _ in range(3))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(BATCH, LENGTH, WIDTH)


def block(x, down, up, mask):
    """An attention and an MLP of one rank."""
    attended = x + attend(x, down, up, mask)
    return attended + linear(linear(gelu(linear(linear(attended, down), up)), down), up)


def padded(padding):
    """The mask as transformers makes it of ``padding[batch, len]``."""
    batch, q, k = (torch.arange(size) for size in (BATCH, LENGTH, LENGTH))
    return (q[:, None] >= 0) & padding[batch[:, None, None, None], k[None, None, None, :]]


def padded_layers(x, down, up, padding):
    mask = padded(padding)
    for _ in range(LAYERS):
        x = block(x, down, up, mask)
    return x


@pytest.fixture
def readings(monkeypatch) -> Counter:
    """How often each mask was read."""
    counts, read_mask = Counter(), rewriting.read_mask

    def counted(mask, floored):
        counts[mask] += 1
        return read_mask(mask, floored)

    monkeypatch.setattr(rewriting, "read_mask", counted)
    return counts


def test_a_mask_of_all_layers_is_read_once(readings):
    result = rewritten(padded_layers, X, DOWN, UP, PADDING)
    assert result.count("attention") == LAYERS
    assert list(readings.values()) == [1]
    for operator in result.module.graph.find_nodes(op="call_function", target=torch.ops.flashsvd.attention_v5.default):
        assert operator.kwargs["key_padding"].name == "padding" and "mask" not in operator.kwargs
    result.assert_same_result()


def test_layers_with_masks_of_their_own_keep_them(readings):
    """The second mask is made of the first layer's result, which is replaced."""

    def function(x, down, up, padding):
        first = block(x, down, up, padded(padding))
        return block(first, down, up, first[:, None, :, :LENGTH] > -0.1)

    result = rewritten(function, X, DOWN, UP, PADDING)
    assert result.count("attention") == 2
    assert list(readings.values()) == [1, 1]
    result.assert_same_result()


def test_a_reading_is_forgotten_with_its_graph(readings):
    for _ in range(2):
        assert rewritten(padded_layers, X, DOWN, UP, PADDING).count("attention") == LAYERS
    assert list(readings.values()) == [1, 1]


def test_layers_of_one_shape_are_planned_once():
    for plan in (plan_attention, plan_mlp):
        plan.cache_clear()
    rewritten(padded_layers, X, DOWN, UP, PADDING)
    for plan in (plan_attention, plan_mlp):
        known = plan.cache_info()
        assert (known.misses, known.hits) == (1, LAYERS - 1)


def test_layers_of_other_ranks_are_planned_for_themselves():
    plan_attention.cache_clear()

    def function(x, down, up, other_down, other_up, padding):
        return block(block(x, down, up, padded(padding)), other_down, other_up, padded(padding))

    result = rewritten(function, X, DOWN, UP, OTHER_DOWN, OTHER_UP, PADDING)
    assert [match.ranks["q"] for match in result.report.matches if match.kind == "attention"] == [4, 5]
    assert plan_attention.cache_info().misses == 2
    result.assert_same_result()


def test_what_writes_is_searched_once_a_rule(monkeypatch):
    asked = Counter()
    monkeypatch.setattr(order, "mutated_arguments", lambda node: asked.update([node]))
    rewritten(padded_layers, X, DOWN, UP, PADDING)
    assert max(asked.values()) == len(RULES)


def test_padding_of_static_sizes_adds_no_symbols(monkeypatch):
    """The first sum of symbols in a process has sympy import its tensors, which takes as long as all the rules."""
    sums, flatten = [], sympy.Add.flatten

    def recorded(terms):
        sums.extend(term for term in terms if term.free_symbols)
        return flatten(terms)

    clear_cache()
    monkeypatch.setattr(sympy.Add, "flatten", recorded)
    assert rewritten(padded_layers, X, DOWN, UP, PADDING).count("attention") == LAYERS
    assert sums == []
