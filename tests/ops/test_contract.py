"""What torch.library promises for each operator: schema, fake kernel, autograd key, static and dynamic shapes."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from flashsvd_compile import ops

from .regions import (
    attention_arguments,
    linear_arguments,
    mlp_arguments,
    norm,
    packed,
    packed_linear_arguments,
    padding,
)

SMALL = 900
CASES = {
    "linear": (ops.linear, linear_arguments(2, 3, 16)),
    "linear-no-bias": (ops.linear, linear_arguments(7, 16, bias=False, workspace_bytes=SMALL)),
    "linear-both-biases": (ops.linear, linear_arguments(7, 16, down_bias=True)),
    "linear-dense": (ops.linear, linear_arguments(7, 16, rank=None)),
    "linear-merged": (ops.linear, linear_arguments(7, 16, rank=16, strategy="merged")),
    "packed-linear": (ops.packed_linear, packed_linear_arguments(2, 3, 16)),
    "packed-linear-pair": (ops.packed_linear, packed_linear_arguments(7, 16, ranks=(5, None), workspace_bytes=SMALL)),
    "packed-linear-residual": (ops.packed_linear, packed_linear_arguments(2, 3, 16, ranks=(5,), residual=True)),
    "packed-linear-after-norm": (ops.packed_linear, packed_linear_arguments(7, 16, x_norm=norm("rms", 16))),
    "mlp": (ops.mlp, mlp_arguments(2, 3, 16)),
    "mlp-no-bias": (ops.mlp, mlp_arguments(2, 3, 16, bias=False, workspace_bytes=SMALL)),
    "mlp-gated": (ops.mlp, mlp_arguments(2, 3, 16, gated=True, activation="silu", down_bias=True)),
    "mlp-merged": (ops.mlp, mlp_arguments(2, 3, 16, ranks=(16, None, 3), strategy="merged")),
    "mlp-strided": (ops.mlp, mlp_arguments(2, 3, 16, layout="transposed")),
    "mlp-residual": (ops.mlp, mlp_arguments(2, 3, 16, residual=True)),
    "mlp-after-norm": (ops.mlp, mlp_arguments(2, 3, 16, residual=True, x_norm=norm("rms", 16), workspace_bytes=SMALL)),
    "attention": (ops.attention, attention_arguments()),
    "attention-after-norm": (
        ops.attention,
        attention_arguments(residual=True, x_norm=norm("layer", 32, bias=True), workspace_bytes=SMALL),
    ),
    "attention-residual": (ops.attention, attention_arguments(residual=True, layout="strided", workspace_bytes=SMALL)),
    "attention-no-out": (ops.attention, attention_arguments(out=False, bias=False)),
    "attention-small": (ops.attention, attention_arguments(workspace_bytes=SMALL)),
    "attention-cross": (ops.attention, attention_arguments(kv_len=5, down_bias=True)),
    "attention-padded": (ops.attention, attention_arguments(key_padding=padding(7, 4, total=7))),
    "attention-bool-mask": (ops.attention, attention_arguments(mask=torch.ones(7, 7).tril().bool())),
    "attention-bias": (ops.attention, attention_arguments(mask=torch.randn(1, 4, 7, 7))),
    "attention-causal": (ops.attention, attention_arguments(window=(-1, 0))),
    "attention-rotary": (ops.attention, attention_arguments(rotary_dim=4, num_kv_heads=2, interleaved=True)),
    "attention-normed": (
        ops.attention,
        attention_arguments(rotary_dim=4, q_norm=norm("rms", 8), k_norm=norm("layer", 4, 8, bias=True)),
    ),
    "attention-normed-whole": (
        ops.attention,
        attention_arguments(
            q_norm=norm("layer", 32, whole=True), k_norm=norm("rms", 32, whole=True), workspace_bytes=SMALL
        ),
    ),
    "attention-capped": (ops.attention, attention_arguments(softcap=2.0, num_kv_heads=2, window=(-1, 0))),
    "attention-capped-small": (
        ops.attention,
        attention_arguments(softcap=2.0, mask=torch.randn(1, 4, 7, 7), workspace_bytes=SMALL),
    ),
    "attention-values": (ops.attention, attention_arguments(value_dim=6, out_features=20)),
    "attention-documents": (ops.attention, attention_arguments(documents=packed(3, 4, batch=2), window=(-1, 0))),
    "attention-merged": (ops.attention, attention_arguments(ranks=(32, 4, None, 16), strategy="merged")),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    operator, arguments = CASES[name]
    opcheck(operator, arguments)


LENGTHS = (7, 12, 33)
OF_LENGTH = {
    "linear": (ops.linear, lambda n: linear_arguments(2, n, 16)),
    "packed-linear": (ops.packed_linear, lambda n: packed_linear_arguments(2, n, 16)),
    "mlp": (ops.mlp, lambda n: mlp_arguments(2, n, 16, gated=True)),
    "mlp-after-norm": (ops.mlp, lambda n: mlp_arguments(2, n, 16, x_norm=norm("layer", 16))),
    "attention-after-norm": (ops.attention, lambda n: attention_arguments(2, n, x_norm=norm("rms", 32))),
    "attention": (ops.attention, lambda n: attention_arguments(2, n, key_padding=padding(n, 4, total=n))),
    "attention-residual": (ops.attention, lambda n: attention_arguments(2, n, residual=True)),
    "attention-cross": (ops.attention, lambda n: attention_arguments(2, n, n + 1, window=(-1, 0))),
    "attention-normed": (ops.attention, lambda n: attention_arguments(2, n, q_norm=norm("rms", 8))),
    "attention-capped": (ops.attention, lambda n: attention_arguments(2, n, softcap=2.0, window=(-1, 0))),
    "attention-rotary": (ops.attention, lambda n: attention_arguments(2, n, rotary_dim=4)),
    "attention-documents": (ops.attention, lambda n: attention_arguments(2, n, documents=packed(3, n - 3, batch=2))),
}


@pytest.mark.parametrize("name", OF_LENGTH)
def test_one_dynamic_graph_serves_every_length(name):
    """The fake kernel neither specialises a length nor asks for a second graph."""
    operator, arguments_of = OF_LENGTH[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operator, backend=counter, dynamic=True, fullgraph=True)
    compiled(*arguments_of(LENGTHS[0]))
    graphs = counter.frame_count  # Dynamo restarts once over a float argument
    for length in LENGTHS:
        arguments = arguments_of(length)
        torch.testing.assert_close(compiled(*arguments), operator(*arguments))
    assert counter.frame_count == graphs


@pytest.mark.parametrize("name", CASES)
def test_autocast_does_not_reach_inside(name):
    """The result's dtype and precision are those of the inputs, as the fake kernel says."""
    operator, arguments = CASES[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = operator(*arguments)
    torch.testing.assert_close(result, operator(*arguments), rtol=0, atol=0)


def test_memory_is_poisoned():
    """The fixture that every other test relies on."""
    assert torch.empty(3).isnan().all()
    assert torch.ones(1).new_empty(3).isnan().all()
