"""Attention whose heads go into the rank space of the output projection at once."""

from importlib import import_module
from typing import Any

import pytest
import torch

from flashsvd_compile import ops
from flashsvd_compile.ops import attention_folded
from flashsvd_compile.ops.attention_region import parse
from flashsvd_compile.ops.sdpa import cpu_core

from .accuracy import assert_within_error_rule
from .regions import attention_arguments, norm, packed, padding

reference = import_module("flashsvd_compile.ops.attention").reference
LENGTH = 70

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"down_bias": True, "residual": True},
    "no bias": {"bias": False},
    "causal": {"window": (-1, 0)},
    "window": {"window": (9, 3)},
    "padded": {"key_padding": padding(LENGTH, 33, 1, total=LENGTH)},
    "holes": {"key_padding": torch.arange(3 * LENGTH).view(3, LENGTH) % 3 > 0},
    "no visible key": {"key_padding": padding(LENGTH, 0, 5, total=LENGTH)},
    "bias on the scores": {"mask": torch.randn(3, 4, LENGTH, LENGTH)},
    "documents": {"documents": packed(40, 30, batch=3), "window": (-1, 0)},
    "rotated": {"rotary_dim": 16, "rotation_per_item": True},
    "rotated by neighbours": {"rotary_dim": 8, "interleaved": True},
    "grouped": {"num_kv_heads": 2, "window": (-1, 0)},
    "capped": {"softcap": 2.0},
    "layer norm": {"x_norm": norm("layer", 64, bias=True)},
    "rms norm": {"x_norm": norm("rms", 64), "rotary_dim": 16},
    "from elsewhere": {"kv_len": LENGTH},
    "wider result": {"out_features": 80},
    "float64": {"dtype": torch.float64},
    "strided": {"layout": "transposed"},
}


def arguments_of(name: str, workspace_bytes: int = 1 << 24) -> tuple:
    how = {"num_heads": 4, "head_dim": 16, "ranks": (15, 11, 13, 17), "workspace_bytes": workspace_bytes}
    case = dict(CASES[name])
    return attention_arguments(3, LENGTH, case.pop("kv_len", None), features=64, **(how | case))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("workspace_bytes", [1, 1 << 20, 1 << 24])
def test_equals_reference(name, workspace_bytes):
    arguments = arguments_of(name)
    x, rest = arguments[0], arguments[1:]
    context, attn, _, _ = parse(x, rest)
    assert attention_folded.supported(x, context, attn)
    result = attention_folded.streamed(x, context, attn, workspace_bytes, cpu_core)
    residual = rest[import_module("flashsvd_compile.ops.attention").RESIDUAL - 1]
    assert_within_error_rule(result if residual is None else result + residual, reference, arguments, ulps=8)


@pytest.mark.parametrize(
    "how",
    [
        {"ranks": (15, None, 13, 17)},
        {"ranks": (15, 11, 13, None)},
        {"out": False},
        {"ranks": (20, 20, 20, 20)},
        {"value_dim": 8},
        {"kv_len": 50},
        {"q_norm": norm("rms", 16)},
        {"dtype": torch.bfloat16},
    ],
)
def test_left_alone(how):
    given = {"num_heads": 4, "head_dim": 16, "ranks": (15, 11, 13, 17)} | how
    arguments = attention_arguments(2, LENGTH, given.pop("kv_len", None), features=64, **given)
    context, attn, _, _ = parse(arguments[0], arguments[1:])
    assert not attention_folded.supported(arguments[0], context, attn)


@pytest.mark.parametrize(("length", "folded"), [(1000, True), (100, False)])
def test_taken_where_an_item_does_not_fit(length, folded, monkeypatch):
    taken = []
    streamed = attention_folded.streamed
    monkeypatch.setattr(attention_folded, "streamed", lambda *args, **how: taken.append(1) or streamed(*args, **how))
    how = {"num_heads": 4, "head_dim": 64, "ranks": (64, 64, 64, 64), "workspace_bytes": 1 << 19}
    arguments = attention_arguments(2, length, None, features=256, **how)
    assert_within_error_rule(ops.attention(*arguments), reference, arguments, ulps=8)
    assert bool(taken) == folded
