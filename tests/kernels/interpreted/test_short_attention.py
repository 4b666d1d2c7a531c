"""``kernels.short_attention`` against its formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from flashsvd_compile.kernels import short_attention
from flashsvd_compile.kernels.short_attention import MAX_KEYS, MAX_QUERIES, Factors
from flashsvd_compile.kernels.tiles import empty_with_aligned_rows
from tests.kernels.chips import INTERPRETED, running_on
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import padding, random

SCALE = 0.3
HALF = torch.float16
CHIPS = ("pointers", "descriptors")


def tensors(
    items: int, q_len: int, kv_len: int, heads: int, kv_heads: int, dim: int, ranks: tuple[int, int], bias: bool
):
    """Queries, then latent, factor and bias of keys and of values. Between the rows of a latent there is NaN."""
    found = [random(items, q_len, heads, dim, dtype=HALF)]
    for rank in ranks:
        latent = empty_with_aligned_rows(items * kv_len, rank, torch.empty(0, dtype=HALF))
        latent.copy_(random(items * kv_len, rank, dtype=HALF))
        up = random(kv_heads * dim, rank, dtype=HALF, scale=rank**-0.5)
        found += [latent, up, random(kv_heads * dim, dtype=HALF) if bias else None]
    return found


def reference(
    q: Tensor, latent_k, up_k, bias_k, latent_v, up_v, bias_v, key_padding, window: tuple[int, int]
) -> Tensor:
    items, q_len, _, dim = q.shape
    k = linear(latent_k, up_k, bias_k).view(items, -1, len(up_k) // dim, dim)
    v = linear(latent_v, up_v, bias_v).view(items, -1, len(up_v) // dim, dim)
    i, j = torch.arange(q_len)[:, None], torch.arange(k.shape[1])[None, :]
    visible = torch.ones(items, 1, q_len, k.shape[1], dtype=torch.bool)
    if window[1] >= 0:
        visible &= j <= i + window[1]
    if window[0] >= 0:
        visible &= j >= i - window[0]
    if key_padding is not None:
        visible &= key_padding[:, None, None, :]
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=SCALE, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def assert_right(
    given: list, key_padding: Tensor | None = None, window=(-1, -1), chip="pointers", in_place=False
) -> None:
    q, latent_k, up_k, bias_k, latent_v, up_v, bias_v = given
    out = q.clone() if in_place else torch.full_like(q, float("nan"))
    with running_on(INTERPRETED[chip]):
        short_attention.short_attention(
            out if in_place else q,
            Factors(latent_k, up_k, bias_k),
            Factors(latent_v, up_v, bias_v),
            out,
            key_padding=key_padding,
            kv_heads=len(up_k) // q.shape[-1],
            scale=SCALE,
            window_left=window[0],
            window_right=window[1],
        )
    assert_within_error_rule(out, reference, (*given, key_padding, window), ulps=2)


@given(
    items=st.integers(1, 3),
    q_len=st.integers(1, 40),
    kv_len=st.integers(1, 40),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    dim=st.sampled_from((8, 16, 24, 32)),
    ranks=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    bias=st.booleans(),
    window=st.tuples(st.integers(-1, 50), st.integers(-1, 50)),
    chip=st.sampled_from(CHIPS),
)
def test_any_shape(items, q_len, kv_len, kv_heads, group, dim, ranks, bias, window, chip):
    given = tensors(items, q_len, kv_len, kv_heads * group, kv_heads, dim, ranks, bias)
    assert_right(given, window=window, chip=chip)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("visible", [(33, 20), (33, 0), (1, 5)])
@pytest.mark.parametrize("left", [False, True])
def test_padding(chip, visible, left):
    given = tensors(2, 33, 33, 2, 2, 16, (20, 40), True)
    assert_right(given, padding(*visible, total=33, left=left), chip=chip)


@pytest.mark.parametrize("chip", CHIPS)
def test_longest_sequences_and_ranks_of_three_pieces(chip):
    assert_right(tensors(1, MAX_QUERIES, MAX_KEYS, 1, 1, 64, (304, 384), True), chip=chip)


def test_in_place_of_the_queries():
    assert_right(tensors(2, 150, 70, 2, 1, 16, (20, 10), True), padding(70, 35, total=70), in_place=True)


def test_a_number_that_is_none_stays_in_its_own_item():
    given = tensors(2, 20, 20, 2, 2, 16, (12, 12), False)
    given[4][20:] = float("nan")
    q, latent_k, up_k, _, latent_v, up_v, _ = given
    out = torch.empty_like(q)
    with running_on(INTERPRETED["descriptors"]):
        short_attention.short_attention(
            q, Factors(latent_k, up_k, None), Factors(latent_v, up_v, None), out, key_padding=None, kv_heads=2,
            scale=SCALE, window_left=-1, window_right=-1,
        )  # fmt: skip
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((128, 128, 64, (304, 384)), True),
        ((129, 128, 64, (1, 16)), True),
        ((257, 128, 64, (16, 16)), False),
        ((128, 129, 64, (16, 16)), False),
        ((128, 128, 64, (16, 400)), False),
        ((128, 128, 64, (0, 16)), False),
        ((128, 128, 256, (16, 16)), False),
    ],
)
def test_supported_sizes(sizes, expected):
    q_len, kv_len, dim, ranks = sizes
    with running_on(INTERPRETED["descriptors"]):
        assert short_attention.supported(q_len, kv_len, dim, ranks, HALF, torch.device("cpu")) == expected
        assert not short_attention.supported(q_len, kv_len, dim, ranks, torch.float32, torch.device("cpu"))
