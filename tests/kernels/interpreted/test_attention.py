"""``kernels.attention`` against PyTorch's attention with the mask spelled out."""

from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashsvd_compile.kernels import attention
from flashsvd_compile.kernels.launch import launch
from tests.kernels.chips import INTERPRETED, running_on
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import padding, random

SCALE = 0.3


class Case(NamedTuple):
    """Sizes of one attention."""

    items: int = 2
    q_len: int = 37
    kv_len: int = 37
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float16

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        q = random(self.items, self.q_len, self.heads, self.head_dim, dtype=self.dtype)
        k = random(self.items, self.kv_len, self.kv_heads, self.head_dim, dtype=self.dtype)
        v = random(self.items, self.kv_len, self.kv_heads, self.value_dim, dtype=self.dtype)
        return q, k, v


def reference(q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, window: tuple[int, int]) -> Tensor:
    left, right = window
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None, :]
    visible = torch.ones(len(q), 1, q.shape[1], k.shape[1], dtype=torch.bool)
    if right >= 0:
        visible &= j <= i + right
    if left >= 0:
        visible &= j >= i - left
    if key_padding is not None:
        visible &= key_padding[:, None, None, :]
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=SCALE, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def assert_right(
    tensors: tuple[Tensor, Tensor, Tensor],
    key_padding: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    chip: str = "pointers",
    in_place: bool = False,
) -> None:
    q, k, v = tensors
    original = q.clone()
    out = q if in_place else q.new_full((*q.shape[:3], v.shape[3]), float("nan"))
    with running_on(INTERPRETED[chip]):
        attention.attention(
            q,
            k,
            v,
            out,
            key_padding=key_padding,
            bounds=None if key_padding is None else attention.key_bounds(key_padding),
            scale=SCALE,
            window_left=window[0],
            window_right=window[1],
        )
    assert_within_error_rule(out.contiguous(), reference, (original, k, v, key_padding, window), ulps=2)


LENGTH = 150  # several blocks of keys and queries in every table
PADDINGS = {
    "none": None,
    "right": padding(150, 97, total=LENGTH),
    "left": padding(131, 20, total=LENGTH, left=True),
    "both sides": padding(140, 90, total=LENGTH) & padding(130, 145, total=LENGTH, left=True),
    "holes": torch.arange(2 * LENGTH).view(2, LENGTH) % 7 > 2,
    "one key": torch.arange(LENGTH).expand(2, LENGTH) == torch.tensor([[0], [LENGTH - 1]]),
    "nothing visible": padding(0, 77, total=LENGTH),
}
WINDOWS = {
    "unlimited": (-1, -1),
    "causal": (-1, 0),
    "sliding": (20, 0),
    "both ways": (9, 70),
    "diagonal": (0, 0),
    "ahead": (0, -1),
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("key_padding", PADDINGS)
def test_padding_and_window(key_padding, window):
    tensors = Case(q_len=LENGTH, kv_len=LENGTH, heads=1, kv_heads=1).tensors()
    assert_right(tensors, PADDINGS[key_padding], WINDOWS[window])


@pytest.mark.parametrize("chip", INTERPRETED)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 140), (140, 1), (70, 150), (150, 70), (64, 128)])
def test_lengths(q_len, kv_len, chip):
    for window in WINDOWS.values():
        assert_right(Case(q_len=q_len, kv_len=kv_len, items=1, heads=1, kv_heads=1).tensors(), None, window, chip)


@pytest.mark.parametrize("chip", INTERPRETED)
@pytest.mark.parametrize("window", WINDOWS)
def test_without_keys_zeros_and_without_queries_nothing(window, chip):
    left, right = WINDOWS[window]
    for q_len, kv_len in ((70, 0), (0, 70)):
        q, k, v = Case(q_len=q_len, kv_len=kv_len).tensors()
        out = torch.full_like(q, torch.nan)
        with running_on(INTERPRETED[chip]):
            how = {"scale": SCALE, "window_left": left, "window_right": right}
            attention.attention(q, k, v, out, key_padding=None, bounds=None, **how)
        assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.parametrize(("last_blocks", "together"), [(0, 0), (1, 1), (2, 2), (4, 5), (9, 12)])
def test_the_last_heads_of_causal_attention_come_together(last_blocks, together, monkeypatch):
    """Six heads of three blocks of queries, for four processors: each block is computed, whichever heads mix."""
    monkeypatch.setattr(attention, "LAST_BLOCKS", last_blocks)
    case = Case(q_len=LENGTH, kv_len=LENGTH, heads=3, kv_heads=3)
    with patch.object(attention, "launch", wraps=launch) as launched:
        assert_right(case.tensors(), None, WINDOWS["causal"], "descriptors")
    *_, item_heads, heads, of_last, _ = launched.call_args.args
    assert (item_heads, heads, of_last) == (6, 3, together)


@pytest.mark.parametrize("chip", INTERPRETED)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("padded", [False, True])
def test_what_is_no_number_stays_in_its_item(padded, window, chip):
    """Also behind the last of keys that fill no block, which are hidden by weights of 0."""
    tensors = Case(items=3, q_len=70, kv_len=70).tensors()
    for tensor in tensors:
        tensor[1] = torch.nan
    key_padding = padding(70, 60, 45, total=70) if padded else None
    out = torch.empty_like(tensors[0])
    left, right = WINDOWS[window]
    how = {"scale": SCALE, "window_left": left, "window_right": right, "key_padding": key_padding}
    with running_on(INTERPRETED[chip]):
        bounds = None if key_padding is None else attention.key_bounds(key_padding)
        attention.attention(*tensors, out, bounds=bounds, **how)
    assert not out[::2].isnan().any()
    assert out[1].isnan().any()


@pytest.mark.parametrize("chip", INTERPRETED)
@pytest.mark.parametrize("head_dim", [1, 16, 24, 64, 80, 96, 128])
def test_head_sizes(head_dim, chip):
    for dtype in dtypes_of(chip):
        case = Case(1, q_len=70, kv_len=70, kv_heads=1, head_dim=head_dim, value_dim=head_dim, dtype=dtype)
        assert_right(case.tensors(), None, WINDOWS["causal"], chip)


def dtypes_of(chip: str) -> list[torch.dtype]:
    with running_on(INTERPRETED[chip]):
        device = torch.device("cpu")
        return [dtype for dtype in (torch.float16, torch.float32) if attention.supported(64, 64, dtype, device)]


def test_float32_needs_more_shared_memory_than_the_smallest_chips_have():
    assert {chip: len(dtypes_of(chip)) for chip in INTERPRETED} == {"pointers": 2, "descriptors": 2, "small": 1}


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 64), (64, 16), (24, 40), (32, 1)])
def test_values_of_another_size(head_dim, value_dim):
    for chip in INTERPRETED:
        assert_right(Case(head_dim=head_dim, value_dim=value_dim).tensors(), PADDINGS["none"], chip=chip)


@given(
    items=st.integers(1, 3),
    q_len=st.integers(1, 80),
    kv_len=st.integers(1, 80),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    left=st.integers(-1, 20),
    right=st.integers(-1, 20),
    density=st.sampled_from((0.0, 0.3, 0.8, 1.0)),
    in_place=st.booleans(),
    chip=st.sampled_from(tuple(INTERPRETED)),
)
def test_anything(items, q_len, kv_len, kv_heads, group, head_dim, left, right, density, in_place, chip):
    case = Case(items, q_len, kv_len, kv_heads * group, kv_heads, head_dim, head_dim)
    key_padding = torch.rand(items, kv_len) < density
    assert_right(case.tensors(), key_padding, (left, right), chip, in_place)


@pytest.mark.parametrize("chip", INTERPRETED)
def test_some_heads_in_place(chip):
    """Two heads in the middle of five: only theirs are overwritten."""
    q, k, v = Case(heads=5, head_dim=16).tensors()
    before = q.clone()
    assert_right((q[:, :, 1:3], k, v), in_place=True, chip=chip)
    assert torch.equal(q[:, :, :1], before[:, :, :1])
    assert torch.equal(q[:, :, 3:], before[:, :, 3:])


def test_strided_padding():
    """A mask that is a slice of another."""
    visible = torch.rand(2, 2 * LENGTH) < 0.7
    tensors = Case(q_len=LENGTH, kv_len=LENGTH, heads=1, kv_heads=1).tensors()
    assert_right(tensors, visible[:, ::2])
    assert_right(tensors, visible[:1, LENGTH:].expand(2, LENGTH))


@given(st.lists(st.lists(st.booleans(), min_size=1100, max_size=1100), min_size=1, max_size=2))
def test_key_bounds(visible):
    """Longer than one block of the kernel."""
    bounds = attention.key_bounds(torch.tensor(visible))
    for row, found in zip(visible, bounds.tolist(), strict=True):
        keys = [key for key, seen in enumerate(row) if seen]
        assert found == ([keys[0], keys[-1] + 1, len(keys)] if keys else [len(row), 0, 0])
