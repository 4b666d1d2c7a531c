"""Norms of queries and keys: the library's by another name, whole whatever the chunks, and computed in float32."""

import pytest
import torch
from torch.nn import functional

from flashsvd_compile import ops
from flashsvd_compile.ops import norm
from flashsvd_compile.ops.attention import chunking, reference
from flashsvd_compile.ops.attention_region import parse

from .accuracy import assert_within_error_rule, relative_error
from .regions import attention_arguments
from .regions import norm as norm_arguments

HEADS, DIM = 3, 8


def parsed(kind: str, *shape: int, **how) -> norm.Norm:
    found = norm.parse("q", norm_arguments(kind, *shape, dtype=torch.float64, **how), HEADS, DIM, torch.float64)
    assert found is not None
    return found


@pytest.mark.parametrize("whole", [False, True])
def test_reference_is_that_of_the_library(whole):
    x = torch.randn(2, 5, HEADS, DIM, dtype=torch.float64)
    shape = (HEADS, DIM) if whole else (DIM,)
    weight, bias = torch.randn(shape).double(), torch.randn(shape).double()
    rms, layer = (norm.parse("q", (kind, weight, bias, 1e-3, whole), HEADS, DIM, x.dtype) for kind in ("rms", "layer"))
    assert relative_error(norm.apply(x, layer), functional.layer_norm(x, shape, weight, bias, 1e-3)) < 1e-14
    assert relative_error(norm.apply(x, rms), functional.rms_norm(x, shape, weight, 1e-3) + bias) < 1e-14


@pytest.mark.parametrize("shape", [(DIM,), (HEADS, DIM), (HEADS * DIM,)])
def test_a_weight_belongs_to_its_features(shape):
    weight = torch.arange(1.0, torch.Size(shape).numel() + 1).double().view(shape)
    found = norm.parse("q", ("rms", weight, None, 0.0, False), HEADS, DIM, torch.float64)
    ones = torch.ones(1, 1, HEADS, DIM, dtype=torch.float64)
    expected = weight.view(-1, DIM).expand(HEADS, DIM)
    torch.testing.assert_close(norm.apply(ones, found)[0, 0], expected)


@pytest.mark.parametrize("scratch", [1, 100, 400, 10**6])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("whole", [False, True])
def test_in_place_a_few_positions_at_a_time(scratch, kind, whole):
    x = torch.randn(2, 5, HEADS, DIM, dtype=torch.float64)
    found = parsed(kind, HEADS, DIM, bias=True, whole=whole)
    expected = norm.apply(x, found)
    assert norm.apply_(x, found, scratch) is x
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_some_heads_of_a_whole_norm_by_known_statistics(kind):
    x = torch.randn(2, 5, HEADS, DIM, dtype=torch.float64)
    found = parsed(kind, HEADS, DIM, bias=True, whole=True)
    known = norm.statistics(x.flatten(0, 1), found)
    some = slice(1, 3)
    expected = norm.apply(x, found)[:, :, some]
    actual = norm.apply_(x[:, :, some].contiguous(), found.of_heads(some), 100, known)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    x = torch.randn(2, 50, HEADS, DIM, dtype=torch.float64).to(dtype)
    weight = torch.rand(DIM, dtype=torch.float32) + 0.5
    found = norm.parse("q", ("rms", weight, None, 1e-6, False), HEADS, DIM, dtype)
    exact = functional.rms_norm(x.double(), (DIM,), weight.double(), 1e-6)
    assert torch.equal(norm.apply(x, found), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workspace_bytes", [1, 1000, 2000, 3000, 5000, 9000, 20_000])
@pytest.mark.parametrize("kv_len", [None, 0, 11])
def test_whole_norms_at_every_chunk_boundary(workspace_bytes, kv_len, dtype):
    """Also where keys are lifted a head at a time, so that no chunk has all of a position's features."""
    arguments = attention_arguments(
        3, 7, kv_len, num_kv_heads=2, dtype=dtype, workspace_bytes=workspace_bytes,
        q_norm=norm_arguments("layer", 32, bias=True, whole=True, dtype=dtype),
        k_norm=norm_arguments("layer", 2, 8, bias=True, whole=True, dtype=dtype),
    )  # fmt: skip
    assert_within_error_rule(ops.attention(*arguments), reference, arguments)


def test_a_small_workspace_lifts_a_head_at_a_time():
    """What the test above is about does happen."""
    arguments = attention_arguments(3, num_kv_heads=2, k_norm=norm_arguments("rms", 16, whole=True))
    context, attn, _, _ = parse(arguments[0], arguments[1:])
    chunk = chunking(attn, 3, 7, context.shape[1], workspace_elements=500)
    assert (chunk.items, chunk.kv_heads) == (1, 1)


def test_no_norm_takes_no_scratch():
    arguments = attention_arguments()
    _, attn, _, _ = parse(arguments[0], arguments[1:])
    assert chunking(attn, 2, 7, 7, workspace_elements=500).norm_scratch == 0
