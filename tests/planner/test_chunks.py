"""The planner's chunks of keys and values beside those that the GPU's operator cuts."""

import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashsvd_compile.ops.attention_gpu import _chunking
from flashsvd_compile.ops.attention_region import Attention
from flashsvd_compile.ops.projection import Projection
from flashsvd_compile.planner import AttentionShape, memory
from flashsvd_compile.planner.device import device_of

DIM = 16


def projection(rank: int | None, features: int, in_features: int) -> Projection[torch.Tensor]:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    if rank is None:
        return Projection(None, None, empty(features, in_features), None)
    return Projection(empty(rank, in_features), None, empty(features, rank), None)


@given(
    batch=st.integers(1, 40),
    length=st.integers(129, 600),
    heads=st.integers(1, 12),
    rank=st.sampled_from([None, 300]),
    kib=st.integers(1, 20000),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_keys_and_values_are_cut_as_predicted(batch, length, heads, rank, kib, dtype):
    width = heads * DIM
    q, k, v, out = (projection(r, width, width) for r in (None, rank, rank, None))
    attn = Attention(
        q, k, v, out, key_padding=None, mask=None, cos=None, sin=None, interleaved=False, q_norm=None, k_norm=None,
        num_heads=heads, num_kv_heads=heads, scale=1.0, softcap=0.0, window_left=-1, window_right=-1,
    )  # fmt: skip
    context = torch.empty(batch, length, width, dtype=dtype, device="meta")
    chunk = _chunking(length, context, attn, 1024 * kib // dtype.itemsize)
    ranks: dict[str, int | None] = {"q": None, "k": rank, "v": rank, "out": None}
    features: dict[str, int] = dict.fromkeys(("q", "k", "v", "out"), width)
    b, n = sympy.Integer(batch), sympy.Integer(length)
    shape = AttentionShape(ranks, features, sympy.Integer(width), dtype.itemsize, "H100", {}, b, n, n, heads, heads)
    predicted = memory.attention_chunks(shape, device_of("H100"), sympy.Integer(1024 * kib))
    assert predicted.bytes == dtype.itemsize * (chunk.elements + chunk.passing)
    assert predicted.number == -(-batch // chunk.items) * -(-heads // chunk.kv_heads)
