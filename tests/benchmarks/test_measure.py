"""The measuring functions, as far as a CPU shows them."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import measure

CPU = torch.device("cpu")


def heads(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 8, dtype=torch.float64, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("kind", ["plain", "causal", "padded"])
def test_blockwise_attention_is_attention(monkeypatch, kind):
    monkeypatch.setattr(measure, "REFERENCE_QUERY_BLOCK", 4)
    q, k, v = heads(11)
    mask = (torch.arange(11) < 9).expand(2, 1, 1, 11) if kind == "padded" else None
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind == "causal")
    with measure.blockwise_attention():
        actual = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind == "causal")
    torch.testing.assert_close(actual, expected)
    assert torch.nn.functional.scaled_dot_product_attention is scaled_dot_product_attention


def test_timing_takes_at_least_the_minimum_and_warms_up():
    calls = []
    result = measure.timing(lambda: calls.append(None), CPU, minimum=20)
    assert result.samples >= 20
    assert len(calls) > result.samples
    assert result.median_ms >= 0
