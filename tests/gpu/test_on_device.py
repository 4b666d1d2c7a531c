"""Operators and whole models on a GPU: right by the error rule, without host synchronisation, replayable, small."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import flashsvd_compile as fsvd
from flashsvd_compile import ops
from flashsvd_compile.ops import attention_gpu, attention_region
from tests.ops.accuracy import assert_within_error_rule, relative_error
from tests.ops.regions import (
    attention_arguments,
    linear_arguments,
    mlp_arguments,
    norm,
    packed,
    packed_linear_arguments,
    random,
)

pytestmark = pytest.mark.gpu
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)


def on_gpu(arguments: tuple) -> tuple:
    """What shares memory does so there, too."""
    memories = {a.untyped_storage().data_ptr(): a.untyped_storage() for a in arguments if isinstance(a, Tensor)}
    moved = {address: memory.cuda() for address, memory in memories.items()}

    def view(a: Tensor) -> Tensor:
        memory = moved[a.untyped_storage().data_ptr()]
        empty = torch.empty(0, dtype=a.dtype, device="cuda")
        return empty.set_(memory, a.storage_offset(), a.shape, a.stride())  # pyright: ignore[reportArgumentType]

    return tuple(view(a) if isinstance(a, Tensor) else a for a in arguments)


def reference_of(operator):
    """The eager reference of an operator."""
    name = operator._schema.name.removeprefix("flashsvd::").rpartition("_v")[0]
    return import_module(f"flashsvd_compile.ops.{name}").reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(24, None, 40), (192, None, 304), (384, None, 96), (250, None, 7), (1, None, 5)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_fused_mlp(dtype, ranks, layout):
    shape: dict[str, Any] = {"width": 1024, "out_features": 768, "strategy": "fused", "layout": layout, "dtype": dtype}
    arguments = on_gpu(mlp_arguments(1, 513, 768, ranks=ranks, **shape))
    assert_within_error_rule(ops.mlp(*arguments), reference_of(ops.mlp), arguments)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("workspace_bytes", [1 << 19, 1 << 24])
@pytest.mark.parametrize("dtype", HALVES)
def test_mlp_of_odd_ranks(gated, workspace_bytes, dtype):
    shape: dict[str, Any] = {"width": 3000, "out_features": 768, "gated": gated, "workspace_bytes": workspace_bytes}
    arguments = on_gpu(mlp_arguments(3, 200, 768, ranks=(453, 449, 501), dtype=dtype, **shape))
    assert_within_error_rule(ops.mlp(*arguments), reference_of(ops.mlp), arguments)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "relu_squared", "quick_gelu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_mlp_activations(activation, gated, dtype):
    how: dict[str, Any] = {
        "width": 512,
        "out_features": 256,
        "gated": gated,
        "activation": activation,
        "strategy": "fused",
    }
    arguments = on_gpu(mlp_arguments(300, 256, ranks=(64, 48, 80), dtype=dtype, workspace_bytes=1 << 18, **how))
    assert_within_error_rule(ops.mlp(*arguments), reference_of(ops.mlp), arguments)


@pytest.mark.parametrize("rows", [1, 2, 8, 16])
@pytest.mark.parametrize("ranks", [(256, 192, 304), (453, 449, 501), (None, 33, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows(rows, ranks, dtype):
    """As decoding has them: launches overlap, so each is repeated, and what the last one left must not show."""
    how: dict[str, Any] = {"width": 3000, "out_features": 1000, "activation": "silu", "dtype": dtype}
    for operator, arguments in (
        (ops.linear, linear_arguments(rows, 1, 1000, out_features=1016, rank=ranks[2], dtype=dtype)),
        (ops.packed_linear, packed_linear_arguments(1, rows, 1000, ranks=ranks, dtype=dtype)),
        (ops.mlp, mlp_arguments(rows, 1000, ranks=ranks, gated=True, **how)),
        (ops.mlp, mlp_arguments(rows, 1000, ranks=ranks, **how)),
    ):
        x, *weights = on_gpu(arguments)
        for _ in range(4):
            fresh = torch.randn_like(x)
            assert_within_error_rule(operator(fresh, *weights), reference_of(operator), (fresh, *weights), ulps=2)


@pytest.mark.parametrize("rank", [333, 336, 500])
@pytest.mark.parametrize("rows", [60, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(rows, rank, dtype):
    arguments = linear_arguments(rows, 1, 1000, out_features=1016, rank=rank, dtype=dtype, workspace_bytes=1 << 20)
    arguments = on_gpu(arguments)
    assert_within_error_rule(ops.linear(*arguments), reference_of(ops.linear), arguments)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("ranks", [(256, 192, 304), (453, 449, 501)])
@pytest.mark.parametrize("kind", ["none", "rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_after_a_norm_and_beside_a_residual(rows, ranks, kind, dtype):
    """A layer of one token: each operator reads what the one before it left, and adds to it."""
    of_x: dict[str, Any] = {"dtype": dtype, "residual": True}
    if kind != "none":
        of_x["x_norm"] = norm(kind, 1000, bias=kind == "layer", dtype=dtype)
    how: dict[str, Any] = {"width": 3000, "out_features": 1000, "activation": "silu", "gated": True, **of_x}
    for operator, arguments in (
        (ops.packed_linear, packed_linear_arguments(rows, 1000, ranks=ranks, **of_x)),
        (ops.packed_linear, packed_linear_arguments(rows, 1000, ranks=ranks[:1], **of_x)),
        (ops.mlp, mlp_arguments(rows, 1000, ranks=ranks, **how)),
    ):
        x, *weights = on_gpu(arguments)
        for _ in range(5):
            x.normal_()
            assert_within_error_rule(operator(x, *weights), reference_of(operator), (x, *weights), ulps=2)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("before", ["copy", "memset", "another stream", "weights"])
def test_few_rows_in_a_graph_behind_anything(rows, before):
    """Launches that begin early wait for whatever came before: also for weights that are still being written."""
    how: dict[str, Any] = {"width": 3000, "out_features": 1000, "dtype": torch.bfloat16, "ranks": (453, 449, 501)}
    x, *weights = on_gpu(mlp_arguments(rows, 1000, **how))
    source, other = torch.randn_like(x), torch.cuda.Stream()
    factors = [weight for weight in weights if isinstance(weight, Tensor) and weight.dim() == 2]
    written = [factor.clone() for factor in factors]

    def step() -> Tensor:
        if before == "copy":
            x.copy_(source)
        elif before == "memset":
            x.zero_()
        elif before == "another stream":
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                torch.mul(source, 2, out=x)
            torch.cuda.current_stream().wait_stream(other)
        else:
            for values, factor in zip(written, factors, strict=True):
                torch.mul(values, 2, out=factor)
        return ops.mlp(x, *weights)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for _ in range(4):
        source.normal_()
        for values in written:
            values.normal_(std=0.03)
        result.fill_(torch.nan)
        graph.replay()
        assert_within_error_rule(result, reference_of(ops.mlp), (x, *weights), ulps=2)


ATTENTIONS: dict[str, dict[str, Any]] = {
    "padded": {"q_len": 200, "num_heads": 4, "head_dim": 64, "features": 256},
    "causal-gqa-80": {
        "q_len": 333, "num_heads": 4, "num_kv_heads": 2, "head_dim": 80, "features": 320, "window": (-1, 0),
    },
    "window-mqa-128": {
        "q_len": 300, "num_heads": 4, "num_kv_heads": 1, "head_dim": 128, "features": 512, "window": (64, 0),
    },
    "llama": {
        "batch": 1, "q_len": 2100, "num_heads": 4, "head_dim": 128, "features": 512, "window": (-1, 0),
        "rotary_dim": 128,
    },
    "partial-interleaved": {
        "q_len": 130, "num_heads": 2, "head_dim": 64, "features": 128, "rotary_dim": 32, "interleaved": True,
    },
    "odd-ranks": {"q_len": 129, "num_heads": 12, "head_dim": 64, "features": 768, "ranks": (33, 150, 201, 97)},
    "beyond-the-kernel": {"q_len": 257, "num_heads": 8, "head_dim": 64, "features": 512, "ranks": (400, 400, 410, 400)},
    "odd-ranks-beyond-the-kernel": {
        "q_len": 257, "num_heads": 8, "head_dim": 64, "features": 512, "ranks": (401, 399, 277, 301), "down_bias": True,
    },
    "odd-ranks-normalised": {
        "q_len": 257, "num_heads": 4, "head_dim": 128, "features": 512, "ranks": (401, 399, 277, 301),
        "rotary_dim": 128, "x_norm": norm("rms", 512, weight=False),
    },
    "merged": {
        "q_len": 150, "num_heads": 4, "head_dim": 64, "features": 256, "ranks": (200, 300, 190, 128),
        "strategy": "merged",
    },
    "merged-rotated": {
        "q_len": 150, "num_heads": 4, "head_dim": 128, "features": 512, "ranks": (400, 300, 290, 128),
        "strategy": "merged", "rotary_dim": 128,
    },
    "merged-for-queries-of-its-own": {
        "q_len": 150, "num_heads": 4, "head_dim": 64, "features": 256, "ranks": (100, 300, 190, 128),
        "strategy": "merged", "num_kv_heads": 2, "down_bias": True,
    },
    "causal-96": {"q_len": 300, "num_heads": 4, "head_dim": 96, "features": 384, "window": (-1, 0)},
    # Queries, keys and values of a chunk in one launch on Hopper: two chunks, or one whose heads are rotated.
    "together": {"batch": 30, "q_len": 700, "num_heads": 4, "head_dim": 64, "features": 256},
    "together-causal": {
        "batch": 6, "q_len": 700, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "features": 256,
        "window": (-1, 0), "rotary_dim": 64,
    },
    "dense-side-by-side": {
        "q_len": 65, "num_heads": 4, "head_dim": 64, "features": 256, "ranks": (48, None, None, 40),
        "side_by_side": True,
    },
    "dense-member": {"q_len": 65, "num_heads": 4, "head_dim": 96, "features": 384, "ranks": (48, None, None, 40)},
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace_bytes", [1 << 24, 1 << 15])
def test_attention(name, dtype, workspace_bytes):
    how: dict[str, Any] = {"ranks": (48, 40, 33, 56), **ATTENTIONS[name]}
    batch, length = how.pop("batch", 3), how["q_len"]
    padding = None
    if name not in ("llama", "window-mqa-128", "causal-96", "together-causal"):
        padding = torch.rand(batch, length) < 0.8
        padding[:, 0] = True  # torch's own kernels disagree about queries that see nothing
    arguments = attention_arguments(batch, key_padding=padding, dtype=dtype, workspace_bytes=workspace_bytes, **how)
    arguments = on_gpu(arguments)
    assert_within_error_rule(ops.attention(*arguments), reference_of(ops.attention), arguments)


def by_the_library(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Regions that none of our attention kernels takes."""
    return {
        "norms-a-head": {"q_norm": norm("rms", 64, dtype=dtype), "k_norm": norm("rms", 64, dtype=dtype)},
        "norms-of-all-heads": {
            "q_norm": norm("layer", 256, bias=True, whole=True, dtype=dtype),
            "k_norm": norm("layer", 256, bias=True, whole=True, dtype=dtype),
            "window": (-1, 0),
        },
        "norms-and-rotation": {
            "q_norm": norm("rms", 64, dtype=dtype), "k_norm": norm("rms", 64, dtype=dtype), "rotary_dim": 64,
        },
        "softcap": {"softcap": 20.0, "window": (-1, 0)},
        "softcap-window": {"softcap": 20.0, "window": (50, 0)},
        "documents": {"documents": packed(100, 3, 90, 40, batch=3)},
        "documents-causal": {"documents": packed(100, 3, 90, 40, batch=3), "window": (-1, 0)},
        "additive": {"mask": random(1, 4, 233, 233, dtype=dtype)},
        "unequal-heads": {"value_dim": 32},
    }  # fmt: skip


@pytest.mark.parametrize("name", by_the_library(torch.float32))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace_bytes", [1 << 24, 1 << 17])
def test_attention_by_the_library(name, dtype, workspace_bytes):
    how = by_the_library(dtype)[name]
    how |= {"features": 256, "head_dim": 64, "ranks": (48, 40, 33, 56), "dtype": dtype}
    arguments = on_gpu(attention_arguments(3, 233, workspace_bytes=workspace_bytes, **how))
    assert_within_error_rule(ops.attention(*arguments), reference_of(ops.attention), arguments)


def test_padding_by_item_and_left_padding():
    lengths = torch.tensor([1, 77, 128, 250])
    right = torch.arange(250)[None] < lengths[:, None]
    for padding in (right, right.flip(1)):
        arguments = attention_arguments(4, 250, features=256, head_dim=64, ranks=(48, 40, 33, 56), key_padding=padding)
        arguments = on_gpu(tuple(a.half() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments))
        assert_within_error_rule(ops.attention(*arguments), reference_of(ops.attention), arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_query_that_sees_no_key_gives_zeros(dtype):
    padding = torch.tensor([[False], [True]]).expand(2, 100).contiguous()
    arguments = attention_arguments(2, 100, features=128, head_dim=32, out=False, key_padding=padding, dtype=dtype)
    nothing, something = ops.attention(*on_gpu(arguments))
    assert not nothing.any()
    assert something.all()


def test_every_element_is_written():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        mlp = on_gpu(mlp_arguments(333, 256, width=512, ranks=(96, None, 40), strategy="fused", dtype=torch.bfloat16))
        attention = on_gpu(attention_arguments(3, 130, features=256, head_dim=64, dtype=torch.bfloat16))
        assert not ops.mlp(*mlp).isnan().any()
        assert not ops.attention(*attention).isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


def cases() -> list[tuple]:
    padding = torch.arange(256)[None] < torch.tensor([[200], [256]])
    mlp = mlp_arguments(
        2, 256, 256, width=1024, out_features=256, ranks=(96, None, 80), strategy="fused", dtype=torch.half
    )
    how: dict[str, Any] = {"features": 256, "head_dim": 64, "ranks": (48, 40, 33, 56), "dtype": torch.half}
    attention = attention_arguments(2, 256, key_padding=padding, **how)
    return [(ops.mlp, on_gpu(mlp)), (ops.attention, on_gpu(attention))]


@pytest.mark.parametrize("index", [0, 1], ids=["mlp", "attention"])
def test_replays_in_a_cuda_graph_without_synchronising(index):
    operator, arguments = cases()[index]
    operator(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator(*arguments)
    arguments[0].copy_(torch.randn_like(arguments[0]))
    graph.replay()
    torch.testing.assert_close(captured, operator(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mlp", "split mlp", "streamed mlp", *ATTENTIONS])
def test_replayed_launches_are_right_for_other_tensors(name):
    """From the third call on; a shape of its own each, so that no other test has called it."""
    operator = ops.mlp if "mlp" in name else ops.attention
    for _ in range(5):
        if "mlp" in name:
            rows, strategy = (40, "fused") if "split" in name else (1030, "streamed" if "streamed" in name else "fused")
            ranks = (96, None, 81)
            given = mlp_arguments(
                rows, 264, width=520, out_features=264, ranks=ranks, strategy=strategy, dtype=torch.half
            )
        else:
            how: dict[str, Any] = {"ranks": (48, 40, 33, 56), **ATTENTIONS[name], "dtype": torch.half}
            batch, length = how.pop("batch", 3) + 1, how["q_len"]
            padding = torch.arange(length)[None] < torch.randint(1, length, (batch, 1))
            given = attention_arguments(batch, key_padding=padding, workspace_bytes=1 << 17, **how)
        given = on_gpu(given)
        assert_within_error_rule(operator(*given), reference_of(operator), given)


def test_attention_needs_its_result_and_the_workspace():
    how: dict[str, Any] = {
        "features": 768,
        "num_heads": 12,
        "head_dim": 64,
        "ranks": (192,) * 4,
        "dtype": torch.bfloat16,
    }
    workspace = 4 << 20
    arguments = on_gpu(attention_arguments(8, 512, workspace_bytes=workspace, **how))
    _, attn, _, _ = attention_region.parse(arguments[0], arguments[1:])
    assert attention_gpu.supported(arguments[0], attn)
    size = ops.attention(*arguments).nbytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.attention(*arguments)
    assert torch.cuda.max_memory_allocated() - before <= size + workspace + (1 << 20)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("ranks", [(48, 40, 33, 56), (400, 300, 410, 400)], ids=["on chip", "in blocks"])
@pytest.mark.parametrize("workspace_bytes", [1 << 24, 3 << 19])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_after_norm(kind, ranks, workspace_bytes, dtype):
    shape: dict[str, Any] = {"features": 512, "num_heads": 4, "head_dim": 128, "rotary_dim": 128, "window": (-1, 0)}
    how: dict[str, Any] = {"ranks": ranks, "dtype": dtype, "residual": True, "workspace_bytes": workspace_bytes}
    for _ in range(4):
        x_norm = norm(kind, 512, bias=kind == "layer", dtype=dtype)
        arguments = on_gpu(attention_arguments(3, 530, x_norm=x_norm, **shape, **how))
        assert_within_error_rule(ops.attention(*arguments), reference_of(ops.attention), arguments)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("strategy", ["fused", "streamed"])
@pytest.mark.parametrize("rows", [3, 1030])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_after_norm(kind, strategy, rows, dtype):
    how: dict[str, Any] = {"width": 520, "out_features": 264, "ranks": (93, 85, 81), "dtype": dtype}
    for gated in (False, True):
        for _ in range(4):
            x_norm = norm(kind, 264, bias=kind == "layer", dtype=dtype)
            given = mlp_arguments(
                rows, 264, gated=gated, x_norm=x_norm, strategy=strategy, workspace_bytes=1 << 18, residual=True, **how
            )
            given = on_gpu(given)
            assert_within_error_rule(ops.mlp(*given), reference_of(ops.mlp), given, ulps=2)


@pytest.mark.parametrize("operator", [ops.mlp, ops.attention])
def test_a_norm_is_within_the_workspace(operator):
    workspace, x_norm = 12 << 20, norm("rms", 1024, dtype=torch.bfloat16)
    how: dict[str, Any] = {"x_norm": x_norm, "dtype": torch.bfloat16, "workspace_bytes": workspace, "residual": True}
    if operator is ops.mlp:
        given = mlp_arguments(8192, 1024, width=2048, out_features=1024, ranks=(304, 304, 304), gated=True, **how)
    else:
        given = attention_arguments(
            1, 4096, features=1024, num_heads=8, head_dim=128, ranks=(304, 304, 304, 304), window=(-1, 0), **how
        )
    given = on_gpu(given)
    for _ in range(3):
        size = operator(*given).nbytes
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        operator(*given)
        assert torch.cuda.max_memory_allocated() - before <= size + workspace + (1 << 20)


def bert(dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    config = BertConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024)
    mask = torch.arange(200)[None] < torch.tensor([[150], [200], [33]])
    return model_of(BertModel(config), dtype), {"attention_mask": mask.long().cuda(), **ids(3, 200)}


def llama(dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(hidden_size=512, num_hidden_layers=2, intermediate_size=1024, vocab_size=1000, **heads)
    config.use_cache = False
    return model_of(LlamaModel(config), dtype), ids(2, 300)


def ids(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 1000, (batch, length), device="cuda")}


def model_of(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    return fsvd.compress(model.requires_grad_(False).eval(), keep_ratio=0.5).to("cuda", dtype)


@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("how", [{}, {"mode": "reduce-overhead"}, {"dynamic": True}], ids=["plain", "graph", "dynamic"])
def test_models(build, how):
    model, inputs = build(torch.bfloat16)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="flashsvd", **how)
    exact_model = build(torch.float64)[0]
    exact_model.load_state_dict(model.state_dict())
    with torch.no_grad():
        for _ in range(3):
            result = fast(**inputs)[0].clone()
        exact = exact_model(**inputs)[0]
        unfused = relative_error(model(**inputs)[0], exact)
    report = fsvd.last_report()
    assert report is not None
    assert (report.count("attention"), report.count("mlp")) == (2, 2)
    assert relative_error(result, exact) <= 1.25 * unfused


def test_a_model_that_moves_to_the_device():
    config = BertConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=256)
    model = fsvd.compress(BertModel(config).requires_grad_(False).eval(), keep_ratio=0.5)
    fast = torch.compile(model, backend="flashsvd")
    tokens = torch.randint(0, 1000, (2, 50))
    with torch.no_grad():
        before = fast(tokens)[0]
        after = fast.to("cuda")(tokens.cuda())[0]
    torch.testing.assert_close(after.cpu(), before, rtol=1e-4, atol=1e-4)


def test_gradients():
    arguments = on_gpu(mlp_arguments(300, 128, width=256, out_features=128, ranks=(32, None, 48), strategy="fused"))
    leaves = [a.requires_grad_() for a in arguments if isinstance(a, Tensor)]
    grad = random(300, 128, dtype=torch.float32).cuda()
    ours = torch.autograd.grad(ops.mlp(*arguments), leaves, grad)
    eager = torch.autograd.grad(reference_of(ops.mlp)(*arguments), leaves, grad)
    for mine, theirs in zip(ours, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
