"""An operator's peak is its result, its workspace and a constant, whatever is computed in it."""

import pytest
import torch

from flashsvd_compile import ops
from flashsvd_compile.measure import peak_activation_bytes
from flashsvd_compile.ops.activation import ACTIVATIONS
from flashsvd_compile.ops.attention import scratch_as_a_whole as scratch_of_attention
from flashsvd_compile.ops.attention_region import parse
from flashsvd_compile.ops.mlp import scratch_as_a_whole as scratch_of_mlp
from flashsvd_compile.ops.mlp_region import Mlp
from flashsvd_compile.ops.projection import group

from .regions import attention_arguments, linear_arguments, mlp_arguments, norm, packed, padding

WORKSPACE = 1 << 21
KERNEL_SCRATCH = 3 << 18
"""PyTorch's attention kernel: for a thread a block of 256 queries by 512 keys of scores, and outputs."""
CALLS = 1 << 17
"""What describes calls of it, where each document is one, and numbers."""

NUMBERS = 16
"""Numbers that an activation multiplies with become tensors of one element."""


@pytest.fixture(autouse=True)
def one_thread():
    """The kernel's scratch grows with the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Overrides the fixture of the other tests: poisoning allocates."""


def assert_bounded(operator, arguments: tuple, constant: int = 0) -> None:
    result = operator(*arguments)
    result_bytes = result.numel() * result.element_size()
    assert result_bytes > WORKSPACE, "the bound says nothing about a small region"
    peak = peak_activation_bytes(lambda: operator(*arguments), torch.device("cpu"))
    assert peak <= result_bytes + WORKSPACE + constant


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation, gated):
    how = {"width": 1024, "out_features": 256, "ranks": (64, None, 48), "workspace_bytes": WORKSPACE}
    assert_bounded(ops.mlp, mlp_arguments(4, 1024, 256, activation=activation, gated=gated, **how), NUMBERS)


@pytest.mark.parametrize("rank", [64, None])
def test_linear(rank):
    how = {"out_features": 256, "rank": rank, "workspace_bytes": WORKSPACE}
    assert_bounded(ops.linear, linear_arguments(4, 1024, 256, **how))


ATTENTIONS = {
    "plain": {},
    "padded": {"key_padding": padding(2048, 1500, total=2048)},
    "holes": {"key_padding": torch.arange(4096).view(2, 2048) % 3 > 0},
    "causal": {"window": (-1, 0)},
    "window": {"window": (100, 0)},
    "grouped": {"num_kv_heads": 1},
    "grouped causal": {"num_kv_heads": 1, "window": (-1, 0)},
    "documents": {"documents": packed(1000, 48, 1000, batch=2), "window": (-1, 0)},
    "interrupted documents": {"documents": torch.arange(4096).view(2, 2048) % 3, "window": (-1, 0)},
    "normed": {"q_norm": norm("rms", 64), "k_norm": norm("layer", 4, 64, bias=True)},
    "normed over all heads": {"q_norm": norm("layer", 256, whole=True), "k_norm": norm("rms", 256, whole=True)},
    "normed in half precision": {
        "q_norm": norm("rms", 64),
        "k_norm": norm("layer", 256, whole=True),
        "dtype": torch.bfloat16,
        "batch": 4,
    },
    "capped": {"softcap": 2.0},
    "capped and padded": {"softcap": 2.0, "key_padding": padding(2048, 1500, total=2048)},
    "capped in half precision": {"softcap": 2.0, "num_kv_heads": 2, "dtype": torch.bfloat16, "batch": 4},
    "dense output": {"ranks": (64, 32, 32, None)},
    "dense inputs": {"ranks": (None, None, None, 64)},
    "output of another width": {"out_features": 320, "batch": 8, "q_len": 512},
    "absorbed": {
        "ranks": (64, None, None, 64),
        "num_kv_heads": 1,
        "head_dim": 40,
        "strategy": "absorbed",
        "batch": 8,
        "q_len": 512,
    },
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name):
    how = {"num_heads": 4, "head_dim": 64, "ranks": (64, 32, 32, 64), "workspace_bytes": WORKSPACE} | ATTENTIONS[name]
    arguments = attention_arguments(**{"batch": 2, "q_len": 2048, "features": 256} | how)
    assert_bounded(ops.attention, arguments, KERNEL_SCRATCH + CALLS)


def test_attention_of_short_items():
    """Many items at a time, none of which needs a block of its own."""
    how = {"num_heads": 4, "head_dim": 64, "ranks": (64, 32, 32, 64), "workspace_bytes": WORKSPACE}
    assert_bounded(ops.attention, attention_arguments(128, 32, None, 256, **how), KERNEL_SCRATCH)


def assert_bounded_as_a_whole(operator, arguments: tuple, scratch: int, constant: int = 0) -> None:
    """With a workspace that just suffices the region is not cut, and takes no more than that."""
    arguments = (*arguments[:-1], scratch)
    result = operator(*arguments)
    peak = peak_activation_bytes(lambda: operator(*arguments), torch.device("cpu"))
    assert peak <= result.numel() * result.element_size() + scratch + constant


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_as_a_whole(activation, gated):
    how = {"width": 1024, "out_features": 256, "ranks": (64, 32, 48), "activation": activation, "gated": gated}
    arguments = mlp_arguments(1, 256, 256, **how)
    hidden, gate, out = group(arguments[1:13])
    assert hidden is not None
    assert out is not None
    scratch = scratch_of_mlp(arguments[0], Mlp(hidden, gate, out))
    assert_bounded_as_a_whole(ops.mlp, arguments, scratch)


WHOLE = ATTENTIONS | {
    "padded": {"key_padding": padding(256, 100, total=256)},
    "capped and padded": {"softcap": 2.0, "key_padding": padding(256, 100, total=256)},
    "holes": {"key_padding": torch.arange(512).view(2, 256) % 3 > 0},
    "documents": {"documents": packed(100, 50, 106, batch=2), "window": (-1, 0)},
    "interrupted documents": {"documents": torch.arange(512).view(2, 256) % 3, "window": (-1, 0)},
    "rotary": {"rotary_dim": 64},
    "value_dim": {"value_dim": 32},
}


@pytest.mark.parametrize("name", WHOLE)
def test_attention_as_a_whole(name):
    how = {"num_heads": 4, "head_dim": 64, "ranks": (64, 32, 32, 64)} | WHOLE[name]
    arguments = attention_arguments(**{"batch": 2, "q_len": 256, "features": 256} | how)
    context, attn, _, _ = parse(arguments[0], arguments[1:])
    scratch = scratch_of_attention(arguments[0], context, attn)
    assert_bounded_as_a_whole(ops.attention, arguments, scratch, KERNEL_SCRATCH // 2)
