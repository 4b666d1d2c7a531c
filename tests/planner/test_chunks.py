"""The planner's chunks of keys and values beside those that the GPU's operator cuts."""

from unittest.mock import patch

import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashsvd_compile.kernels import projection as projection_kernel
from flashsvd_compile.kernels.attention import is_faster_specialised
from flashsvd_compile.kernels.target import KNOWN
from flashsvd_compile.ops.attention_gpu import _chunking, _come_together
from flashsvd_compile.ops.attention_region import Attention
from flashsvd_compile.ops.mlp import GPU_COLUMNS, tiling
from flashsvd_compile.ops.mlp_region import Mlp
from flashsvd_compile.ops.projection import Projection
from flashsvd_compile.planner import AttentionShape, MlpShape, memory, time
from flashsvd_compile.planner.device import device_of
from tests.kernels.chips import running_on

DIM = 16


def projection(rank: int | None, features: int, in_features: int) -> Projection[torch.Tensor]:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    if rank is None:
        return Projection(None, None, empty(features, in_features), None)
    return Projection(empty(rank, in_features), None, empty(features, rank), None)


def attention(heads: int, *ranks: int | None) -> Attention:
    """A region of the ranks of q, k, v and out."""
    width = heads * DIM
    return Attention(
        *(projection(rank, width, width) for rank in ranks),
        key_padding=None, mask=None, cos=None, sin=None, interleaved=False, q_norm=None, k_norm=None,
        num_heads=heads, num_kv_heads=heads, scale=1.0, softcap=0.0, window_left=-1, window_right=-1,
    )  # fmt: skip


@given(
    batch=st.integers(1, 40),
    length=st.integers(129, 600),
    heads=st.integers(1, 12),
    rank=st.sampled_from([None, 300]),
    kib=st.integers(1, 20000),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    gpu=st.sampled_from([("sm_90", "H100"), ("sm_80", "A100")]),
)
def test_keys_and_values_are_cut_as_predicted(batch, length, heads, rank, kib, dtype, gpu):
    """In float32 our kernel attends on the one, on the other the library, whose outputs need room."""
    chip, name = gpu
    width = heads * DIM
    attn = attention(heads, None, rank, rank, None)
    context = torch.empty(batch, length, width, dtype=dtype, device="meta")
    with running_on(KNOWN[chip]):
        chunk = _chunking(length, context, attn, 1024 * kib // dtype.itemsize)
    ranks: dict[str, int | None] = {"q": None, "k": rank, "v": rank, "out": None}
    features: dict[str, int] = dict.fromkeys(("q", "k", "v", "out"), width)
    b, n = sympy.Integer(batch), sympy.Integer(length)
    shape = AttentionShape(ranks, features, sympy.Integer(width), dtype.itemsize, name, {}, b, n, n, heads, heads)
    predicted = memory.attention_chunks(shape, device_of(name), sympy.Integer(1024 * kib))
    assert predicted.bytes == dtype.itemsize * (chunk.elements + chunk.passing)
    assert predicted.number == -(-batch // chunk.items) * -(-heads // chunk.kv_heads)


@given(
    batch=st.integers(1, 80),
    length=st.integers(129, 12000),
    heads=st.integers(2, 12),
    rank=st.integers(1, 256),
    kib=st.integers(1, 100000),
)
def test_queries_come_with_keys_and_values_where_it_is_predicted(batch, length, heads, rank, kib):
    width = heads * DIM
    x = torch.empty(batch, length, width, dtype=torch.bfloat16, device="meta")
    attn, elements = attention(heads, rank, rank, rank, rank), 512 * kib
    with running_on(KNOWN["sm_90"]), patch.object(projection_kernel, "speaks_gluon", lambda target: True):
        together, items = _come_together(x, attn, elements), _chunking(length, x, attn, elements).items
    b, n = sympy.Integer(batch), sympy.Integer(length)
    ranks: dict[str, int | None] = dict.fromkeys(("q", "k", "v", "out"), rank)
    features: dict[str, int] = dict.fromkeys(("q", "k", "v", "out"), width)
    shape = AttentionShape(ranks, features, sympy.Integer(width), 2, "H100", {}, b, n, n, heads, heads)
    device = device_of("H100")
    rows = items * length
    large = together or 2 * rows >= time.LARGE_SHARE * device.full_rows
    factor = time._by_blocks(shape, device, sympy.Integer(1024 * kib))
    assert factor == (time.LARGE_BLOCKS if large else 1)


@given(
    rows=st.integers(1, 100000),
    width=st.integers(1, 5000),
    rank=st.integers(1, 900),
    features=st.integers(1, 2000),
    gated=st.booleans(),
    kib=st.integers(1, 100000),
)
def test_rows_are_cut_as_predicted(rows, width, rank, features, gated, kib):
    """Of float32, whose hidden layer passes some columns at a time."""
    into, out = projection(rank, width, features), projection(rank, features, width)
    mlp = Mlp(into, into if gated else None, out)
    tile = tiling(mlp, rows, 256 * kib, GPU_COLUMNS)
    roles = ("hidden", "gate", "out") if gated else ("hidden", "out")
    ranks: dict[str, int | None] = dict.fromkeys(roles, rank)
    sizes: dict[str, int] = {role: features if role == "out" else width for role in roles}
    shape = MlpShape(ranks, sizes, sympy.Integer(features), 4, "H100", {}, sympy.Integer(rows))
    device, workspace = device_of("H100"), sympy.Integer(1024 * kib)
    assert memory.mlp_chunks(shape, device, workspace) == -(-rows // tile.rows)
    if tile.rows > 1:  # of one row there may be more than the workspace holds
        assert 4 * tile.elements <= memory.mlp_streamed(shape, device, workspace) <= 1024 * kib


@given(
    batch=st.integers(1, 40),
    heads=st.integers(1, 32),
    q_len=st.integers(1, 10000),
    kv_len=st.integers(1, 10000),
    head_dim=st.sampled_from([32, 64, 128]),
    causal=st.booleans(),
)
def test_long_attention_is_faster_where_its_kernel_is_taken(batch, heads, q_len, kv_len, head_dim: int, causal):
    width = heads * head_dim
    ranks: dict[str, int | None] = dict.fromkeys("qkv", 16)
    features: dict[str, int] = dict.fromkeys(("q", "k", "v"), width)
    b, queried, n = map(sympy.Integer, (batch, q_len, kv_len))
    d = sympy.Integer(width)
    shape = AttentionShape(ranks, features, d, 2, "H100", {}, b, queried, n, heads, heads, False, causal)
    queries = torch.empty(batch, q_len, heads, head_dim, dtype=torch.bfloat16, device="meta")
    target = KNOWN["sm_90"]._replace(processors=device_of("H100").full_rows // time.LARGE_ROWS)
    taken = head_dim == 64 and is_faster_specialised(target, queries, kv_len, (-1, 0 if causal else -1))
    assert time._of_long_attention(shape, device_of("H100")) == (time.LONG_ATTENTION if taken else 1)
