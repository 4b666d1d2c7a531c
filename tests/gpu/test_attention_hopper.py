"""Attention in Gluon on a Hopper GPU: every query's result written, nothing else, and right by the error rule."""

import pytest
import torch

from flashsvd_compile.kernels import attention
from flashsvd_compile.kernels.attention_hopper import attention_hopper
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import random

from .hopper import NEEDS_HOPPER, one_launch

pytestmark = NEEDS_HOPPER


def reference(q, k, v, scale, causal):
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.mT * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def operands(q_len, kv_len, dim, *, items=2, heads=4, kv_heads=4, dtype=torch.bfloat16):
    shapes = (items, q_len, heads, dim), (items, kv_len, kv_heads, dim), (items, kv_len, kv_heads, dim)
    return [random(*shape, dtype=dtype).cuda() for shape in shapes]


def assert_right(causal, q, k, v):
    """Attend into the first items of a tensor of NaN, of which the rest must stay."""
    items, *shape = q.shape
    scale = q.shape[-1] ** -0.5
    poisoned = torch.full((items + 1 + 128 // shape[0], *shape), torch.nan, dtype=q.dtype, device="cuda")
    out = poisoned[:items]
    attention_hopper(q, k, v, out, scale=scale, causal=causal)
    assert_within_error_rule(out, reference, (q, k, v, scale, causal))
    assert poisoned[items:].isnan().all()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 200, 512, 1000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lengths(dtype, dim, causal, length):
    assert_right(causal, *operands(length, length, dim, dtype=dtype))


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 300), (300, 1), (130, 700), (700, 130), (128, 129), (257, 256)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_other_keys_than_queries(dim, causal, q_len, kv_len):
    assert_right(causal, *operands(q_len, kv_len, dim))


@pytest.mark.parametrize(("items", "heads", "kv_heads"), [(1, 1, 1), (3, 6, 2), (1, 8, 1), (5, 3, 3)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_grouped_heads(dim, causal, items, heads, kv_heads):
    assert_right(causal, *operands(200, 200, dim, items=items, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [12, 4])
def test_many_tiles_a_program(dim, causal, kv_heads):
    """More keys and values than stay in the cache at once."""
    assert_right(causal, *operands(1000, 1000, dim, items=24, heads=12, kv_heads=kv_heads))


@pytest.mark.parametrize("length", [65, 200, 1000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_in_place(dim, causal, length):
    q, k, v = operands(length, length, dim, items=3, heads=8)
    arguments = q.clone(), k, v, dim**-0.5, causal
    attention_hopper(q, k, v, q, scale=dim**-0.5, causal=causal)
    assert_within_error_rule(q, reference, arguments)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_columns_of_one_matrix(dim, causal):
    """Queries, keys and values side by side; what lies behind the last item is not looked at."""
    items, length, heads, kv_heads = 2, 200, 4, 2
    matrix = random(items + 1, length, heads + 2 * kv_heads, dim, dtype=torch.bfloat16).cuda()
    matrix[items:] = torch.nan
    assert_right(causal, *matrix[:items].split([heads, kv_heads, kv_heads], dim=2))


@pytest.mark.parametrize("specialised", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_what_is_no_number_stays_in_its_item(dim, causal, specialised):
    """Also behind the last of keys that fill no block, which are hidden by weights of 0."""
    q, k, v = operands(200, 200, dim, items=3)
    for tensor in (q, k, v):
        tensor[1] = torch.nan
    out = torch.zeros_like(q)
    if specialised:
        attention_hopper(q, k, v, out, scale=dim**-0.5, causal=causal)
    else:
        how = {"key_padding": None, "bounds": None, "scale": dim**-0.5}
        attention.attention(q, k, v, out, window_left=-1, window_right=0 if causal else -1, **how)
    assert not out[::2].isnan().any()
    assert out[1].isnan().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_large_scores(dim, causal):
    q, k, v = operands(300, 300, dim)
    assert_right(causal, 10 * q, 10 * k, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_nothing_spills(dim, causal):
    with one_launch() as launches:
        assert_right(causal, *operands(256, 256, dim))
    assert launches[0].compiled.n_spills == 0


@pytest.mark.parametrize(("window", "taken"), [((-1, -1), True), ((-1, 0), True), ((64, 0), False)])
@pytest.mark.parametrize("keys", [attention.SPECIALISED_KEYS - 1, attention.SPECIALISED_KEYS])
@pytest.mark.parametrize("dim", [64, 128])
def test_taken_where_it_is_faster(dim, keys, window, taken):
    q, k, v = operands(300, keys, dim)
    how = {"key_padding": None, "bounds": None, "scale": dim**-0.5}
    with one_launch() as launches:
        attention.attention(q, k, v, torch.empty_like(q), window_left=window[0], window_right=window[1], **how)
    assert (launches[0].kernel.__name__ == "attention_hopper_kernel") == (
        taken and dim == attention.SPECIALISED_DIM and keys == attention.SPECIALISED_KEYS
    )
