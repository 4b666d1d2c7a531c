"""Soft-capped scores: a bounded number of them at a time, right for every mask, group of heads and dtype."""

import pytest
import torch

from flashsvd_compile import ops
from flashsvd_compile.ops import attention_gpu, capped
from flashsvd_compile.ops.attention import reference, streamed
from flashsvd_compile.ops.attention_region import parse
from flashsvd_compile.ops.sdpa import cpu_core, sdpa_core

from .accuracy import assert_within_error_rule, in_float64, relative_error
from .regions import attention_arguments, padding

CAP = 0.7
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ADDITIVE = torch.zeros(2, 1, 7, 7).masked_fill(torch.rand(2, 1, 7, 7) < 0.3, float("-inf"))
CASES = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1},
    "causal": {"window": (-1, 0)},
    "window": {"window": (2, 1), "num_kv_heads": 2},
    "right padding": {"key_padding": padding(7, 4, total=7)},
    "left padding, causal": {"key_padding": padding(7, 4, total=7, left=True), "window": (-1, 0)},
    "no visible key": {"key_padding": padding(0, 4, total=7)},
    "holes": {"key_padding": torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1, 0]]).bool()},
    "bool mask": {"mask": torch.rand(2, 1, 7, 7) < 0.4},
    "bool mask of each head": {"mask": torch.rand(1, 4, 7, 7) < 0.4, "num_kv_heads": 2},
    "bias of each head": {"mask": torch.randn(1, 4, 7, 7), "num_kv_heads": 2},
    "bias with holes": {"mask": ADDITIVE, "window": (-1, 0)},
    "documents": {"documents": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [3, 3, 2, 2, 2, 3, 1]]), "window": (-1, 0)},
    "cross": {"kv_len": 11},
    "no keys": {"kv_len": 0},
    "other values": {"value_dim": 6, "num_kv_heads": 2},
}


@pytest.fixture
def few_scores(monkeypatch):
    """Blocks of a few queries."""
    monkeypatch.setitem(capped.SCORES, "cpu", 60)


def region(name: str, dtype: torch.dtype, batch: int = 2, **how) -> tuple:
    how = CASES[name] | how
    if batch == 1:
        cut = {key: how[key][:1] for key in ("key_padding", "mask", "documents") if how.get(key) is not None}
        how |= cut
    if how.get("mask") is not None and how["mask"].is_floating_point():
        how["mask"] = how["mask"].to(dtype)
    return attention_arguments(batch, softcap=CAP, dtype=dtype, **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, batch, dtype, few_scores):
    for workspace_bytes in (1, 1500, 5000, 1 << 24):
        arguments = region(name, dtype, batch, workspace_bytes=workspace_bytes)
        assert_within_error_rule(ops.attention(*arguments), reference, arguments, ulps=2)


@pytest.mark.parametrize("core", [cpu_core, sdpa_core])
@pytest.mark.parametrize("name", CASES)
def test_both_cores(name, core):
    """The second is that of a GPU, whose kernels do not know a cap."""
    arguments = region(name, torch.float32)
    context, attn, _, _ = parse(arguments[0], arguments[1:])
    assert_within_error_rule(streamed(arguments[0], context, attn, 2000, core), reference, arguments, ulps=2)
    assert not attention_gpu.supported(arguments[0], attn)


def test_reference_is_attention_as_written_out():
    """The specification itself, against a spelled-out softmax in float64."""
    arguments = in_float64(attention_arguments(2, 5, bias=False, out=False, softcap=CAP, window=(-1, 0)))
    x = arguments[0]
    q, k, v = ((x @ arguments[i].mT @ arguments[i + 2].mT).unflatten(-1, (4, 8)).transpose(1, 2) for i in (2, 6, 10))
    scores = CAP * torch.tanh(q @ k.mT * 8**-0.5 / CAP)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    assert relative_error(reference(*arguments), (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)) < 1e-14


def test_a_high_cap_changes_nothing():
    plain = attention_arguments()
    names = [argument.name for argument in ops.attention._schema.arguments]
    high = [1e6 if name == "softcap" else value for name, value in zip(names, plain, strict=True)]
    torch.testing.assert_close(ops.attention(*high), ops.attention(*plain))


def test_a_query_that_sees_no_key_gives_zeros(few_scores):
    arguments = attention_arguments(
        out=False, softcap=CAP, window=(-1, 0), key_padding=padding(7, 4, total=7, left=True), workspace_bytes=1
    )
    result = ops.attention(*arguments)
    assert (result[1, :3] == 0).all()
    assert (result[1, 3] != 0).any()


@pytest.mark.parametrize("batch", [1, 2])
def test_several_blocks_of_queries(batch):
    arguments = attention_arguments(
        batch, 900, num_kv_heads=2, softcap=CAP, window=(300, 0), key_padding=torch.rand(batch, 900) < 0.8,
        workspace_bytes=1 << 18,
    )  # fmt: skip
    assert_within_error_rule(ops.attention(*arguments), reference, arguments)
