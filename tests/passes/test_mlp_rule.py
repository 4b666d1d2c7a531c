"""MLPs are found whatever their activation, gate or packing is called."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import linear

from flashsvd_compile import RefusalReason

from .builder import rewritten, tensor

IN, WIDTH, RANK1, RANK2 = 24, 40, 5, 7
X = tensor(2, 6, IN)
HIDDEN = (tensor(RANK1, IN, seed=1), tensor(WIDTH, RANK1, seed=2))
GATE = (tensor(RANK2, IN, seed=3), tensor(WIDTH, RANK2, seed=4))
OUT = (tensor(RANK2, WIDTH, seed=5), tensor(IN, RANK2, seed=6))
BIASES = (tensor(WIDTH, seed=7), tensor(IN, seed=8))


def low_rank(x, down, up, bias=None):
    return linear(linear(x, down), up, bias)


def gpt2_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def fast_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def in_place_relu(x):
    functional.relu(x, inplace=True)
    return x


ACTIVATIONS = {
    "functional.gelu": ("gelu", functional.gelu),
    "nn.GELU": ("gelu", nn.GELU()),
    "erf": ("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "erf, other order": ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x * 2**-0.5))),
    "erf, half of a sum": ("gelu", lambda x: (x + x * torch.special.erf(x / 1.4142135623730951)) / 2),
    "gelu(approximate='tanh')": ("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh")),
    "nn.GELU('tanh')": ("gelu_tanh", nn.GELU(approximate="tanh")),
    "GPT-2's chain": ("gelu_tanh", gpt2_gelu),
    "fast GELU": ("gelu_tanh", fast_gelu),
    "relu": ("relu", functional.relu),
    "torch.relu": ("relu", torch.relu),
    ".relu()": ("relu", lambda x: x.relu()),
    "nn.ReLU": ("relu", nn.ReLU()),
    "nn.ReLU in place": ("relu", nn.ReLU(inplace=True)),
    "in place, result discarded": ("relu", in_place_relu),
    ".relu_()": ("relu", lambda x: x.relu_()),
    "clamp": ("relu", lambda x: x.clamp(min=0)),
    "silu": ("silu", functional.silu),
    "nn.SiLU": ("silu", nn.SiLU()),
    "x * sigmoid(x)": ("silu", lambda x: x * torch.sigmoid(x)),
    "x / (1 + exp(-x))": ("silu", lambda x: x / (1 + torch.exp(-x))),
    "relu ** 2": ("relu_squared", lambda x: functional.relu(x) ** 2),
    "relu squared": ("relu_squared", lambda x: torch.square(functional.relu(x))),
    "relu times relu": ("relu_squared", lambda x: functional.relu(x) * torch.relu(x)),
    "quick gelu": ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    "quick gelu by methods": ("quick_gelu", lambda x: x.mul(1.702).sigmoid().mul(x)),
    "computed in float32": ("gelu", lambda x: functional.gelu(x.float()).to(torch.float32)),
    "followed by dropout off": ("gelu", lambda x: functional.dropout(functional.gelu(x), 0.1, training=False)),
}


@pytest.mark.parametrize("spelling", ACTIVATIONS)
def test_every_spelling_of_an_activation_is_read(spelling):
    name, activation = ACTIVATIONS[spelling]

    def mlp(x, d1, u1, b1, d2, u2, b2):
        return low_rank(activation(low_rank(x, d1, u1, b1)), d2, u2, b2)

    result = rewritten(mlp, X, *HIDDEN, BIASES[0], *OUT, BIASES[1])
    assert result.count("mlp") == 1, result.report
    (call,) = result.module.graph.find_nodes(op="call_function", target=torch.ops.flashsvd.mlp_v3.default)
    assert call.kwargs.get("activation", "gelu") == name
    assert result.report.matches[0].ranks == {"hidden": RANK1, "out": RANK2}
    result.assert_same_result()


@pytest.mark.parametrize(
    "activation",
    [
        functional.relu6,
        torch.tanh,
        functional.leaky_relu,
        lambda x: functional.gelu(x).clamp(-10.0, 10.0),
        lambda x: functional.relu(x).clamp(max=2000.0),
        lambda x: functional.silu(x.clamp(-65504.0, 65504.0)),
        lambda x: x * torch.sigmoid(1.7 * x),
        lambda x: functional.relu(x) + 0.01,
        lambda x: functional.silu(x) * 1.1,
    ],
)
def test_an_unknown_activation_is_named_and_leaves_the_projections_to_the_linear_rule(activation):
    result = rewritten(lambda x, a, b, c, d: low_rank(activation(low_rank(x, a, b)), c, d), X, *HIDDEN, *OUT)
    assert result.count("mlp") == 0
    assert result.count("linear") == 2
    assert RefusalReason.UNKNOWN_ACTIVATION in result.reasons
    result.assert_same_result()


@pytest.mark.parametrize(
    "step", [lambda h: functional.dropout(h, 0.1, training=False), torch.clone, lambda h: h * 0.5 + 1]
)
def test_what_is_no_activation_is_not_reported_as_one(step):
    result = rewritten(lambda x, a, b, w: linear(step(low_rank(x, a, b)), w), X, *HIDDEN, tensor(IN, WIDTH))
    assert RefusalReason.UNKNOWN_ACTIVATION not in result.reasons
    assert result.count("linear") == 1
    result.assert_same_result()


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_bits_read_as_another_dtype_are_no_view(dtype):
    """As the same dtype, too: gradients end there."""

    def mlp(x, a, b, c, d):
        return low_rank(functional.gelu(low_rank(x, a, b).view(dtype).float()), c, d)

    result = rewritten(mlp, X, *HIDDEN, *OUT)
    assert result.count("mlp") == 0
    result.assert_same_result()


GATED = {
    "gate first": lambda x, h, g, o: low_rank(functional.silu(low_rank(x, *g)) * low_rank(x, *h), *o),
    "gate second": lambda x, h, g, o: low_rank(low_rank(x, *h) * functional.silu(low_rank(x, *g)), *o),
    "GeGLU": lambda x, h, g, o: low_rank(functional.gelu(low_rank(x, *g)) * low_rank(x, *h), *o),
    "GeGLU with tanh": lambda x, h, g, o: low_rank(gpt2_gelu(low_rank(x, *g)) * low_rank(x, *h), *o),
    "ReGLU": lambda x, h, g, o: low_rank(torch.relu(low_rank(x, *g)) * low_rank(x, *h), *o),
}


@pytest.mark.parametrize("spelling", GATED)
def test_gated_mlps_match_in_either_order(spelling):
    gated = GATED[spelling]
    result = rewritten(lambda x, a, b, c, d, e, f: gated(x, (a, b), (c, d), (e, f)), X, *HIDDEN, *GATE, *OUT)
    assert result.count("mlp") == 1, result.report
    assert result.report.matches[0].ranks == {"hidden": RANK1, "gate": RANK2, "out": RANK2}
    result.assert_same_result()


def test_a_hand_written_gate_matches_in_any_order_of_its_factors():
    def mlp(x, a, b, c, d, e, f):
        gate = low_rank(x, c, d)
        return low_rank(gate * (torch.sigmoid(gate) * low_rank(x, a, b)), e, f)

    result = rewritten(mlp, X, *HIDDEN, *GATE, *OUT)
    assert result.count("mlp") == 1, result.report
    result.assert_same_result()


PACKED = (tensor(RANK1, IN, seed=9), tensor(2 * WIDTH, RANK1, seed=10), tensor(2 * WIDTH, seed=11))
SPLITS = {
    "chunk": lambda y: y.chunk(2, dim=-1),
    "torch.chunk": lambda y: torch.chunk(y, 2, -1),
    "split": lambda y: y.split(WIDTH, dim=2),
    "split with sizes": lambda y: torch.split(y, [WIDTH, WIDTH], dim=-1),
    "slices": lambda y: (y[..., :WIDTH], y[..., WIDTH:]),
    "slices, all dimensions": lambda y: (y[:, :, :WIDTH], y[:, :, -WIDTH:]),
    "narrow": lambda y: (y.narrow(-1, 0, WIDTH), y.narrow(-1, WIDTH, WIDTH)),
    "unbind": lambda y: y.unflatten(-1, (2, WIDTH)).unbind(-2),
    "select": lambda y: (y.view(2, 6, 2, WIDTH).select(2, 0), y.view(2, 6, 2, WIDTH)[:, :, 1]),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("swapped", [0, 1])
def test_packed_gate_and_hidden_projections_are_sliced_out_of_the_weight(split, swapped):
    def mlp(x, down, up, bias, e, f):
        parts = SPLITS[split](low_rank(x, down, up, bias))
        gate, hidden = parts[swapped], parts[1 - swapped]
        return low_rank(functional.silu(gate) * hidden, e, f)

    result = rewritten(mlp, X, *PACKED, *OUT)
    assert result.count("mlp") == 1, result.report
    assert result.report.matches[0].ranks == {"hidden": RANK1, "gate": RANK1, "out": RANK2}
    result.assert_same_result()


DENSE_IN, DENSE_OUT = tensor(WIDTH, IN, seed=12), tensor(IN, WIDTH, seed=13)


def test_a_dense_member_is_a_projection_of_full_rank():
    result = rewritten(lambda x, w, d, u: low_rank(functional.gelu(linear(x, w)), d, u), X, DENSE_IN, *OUT)
    assert result.report.matches[0].ranks == {"hidden": "full", "out": RANK2}
    result.assert_same_result()
    result = rewritten(lambda x, d, u, w: linear(functional.gelu(low_rank(x, d, u)), w), X, *HIDDEN, DENSE_OUT)
    assert result.report.matches[0].ranks == {"hidden": RANK1, "out": "full"}
    result.assert_same_result()


def test_a_dense_mlp_is_left_to_the_inner_backend():
    result = rewritten(lambda x, w1, w2: linear(functional.gelu(linear(x, w1)), w2), X, DENSE_IN, DENSE_OUT)
    assert result.report.matches == []
    assert result.report.refusals == []


def test_rows_flattened_around_the_mlp():
    def mlp(x, d1, u1, d2, u2):
        hidden = functional.gelu(low_rank(x.view(-1, IN), d1, u1))
        return low_rank(hidden, d2, u2).view(2, 6, IN)

    result = rewritten(mlp, X, *HIDDEN, *OUT)
    assert result.count("mlp") == 1, result.report
    result.assert_same_result()


def test_rows_reshaped_between_every_two_operations():
    def mlp(x, d1, u1, d2, u2):
        h = linear(linear(x.view(-1, IN), d1).view(2, 6, RANK1), u1)
        h = functional.gelu(h.view(12, WIDTH)).view(2, 6, WIDTH)
        return linear(linear(h.flatten(0, 1), d2).unflatten(0, (2, 6)), u2)

    result = rewritten(mlp, X, *HIDDEN, *OUT)
    assert result.count("mlp") == 1, result.report
    result.assert_same_result()


def test_projections_of_different_inputs_are_no_gated_mlp():
    def mlp(x, y, a, b, c, d, e, f):
        return low_rank(functional.silu(low_rank(x, c, d)) * low_rank(y, a, b), e, f)

    result = rewritten(mlp, X, tensor(2, 6, IN, seed=14), *HIDDEN, *GATE, *OUT)
    assert result.count("mlp") == 0
    assert RefusalReason.UNSUPPORTED_MLP in result.reasons
    assert result.count("linear") == 3
    result.assert_same_result()


def test_rows_reordered_between_projection_and_activation_are_not_ignored():
    square = tensor(6, 6, IN)

    def mlp(x, d1, u1, d2, u2):
        return low_rank(functional.gelu(low_rank(x, d1, u1).transpose(0, 1)), d2, u2)

    result = rewritten(mlp, square, *HIDDEN, *OUT)
    assert result.count("mlp") == 0
    result.assert_same_result()


NO_GATES = {
    "clipped on both sides": lambda g, h: functional.silu(g) * h.clamp(-7, 7),
    "clipped from above": lambda g, h: functional.silu(g) * h.clamp(max=50.0),
    "bent": lambda g, h: functional.silu(g) * (h - functional.relu(h - 3)),
    "with a floor": lambda g, h: functional.silu(g) * torch.maximum(h, g * 0 - 5),
}


@pytest.mark.parametrize("spelling", NO_GATES)
def test_a_gate_that_is_not_linear_in_its_other_half(spelling):
    def function(x, d1, u1, d2, u2, d3, u3):
        return low_rank(NO_GATES[spelling](low_rank(x, d1, u1), low_rank(x, d2, u2)), d3, u3)

    result = rewritten(function, 50 * X, *GATE, *HIDDEN, *OUT)
    assert result.count("mlp") == 0
    result.assert_same_result()


@pytest.mark.parametrize("steep", [lambda x: x * torch.sigmoid(1000 * x), lambda x: functional.softplus(x, beta=1e4)])
def test_steep_activations_are_no_relu(steep):
    result = rewritten(lambda x, a, b, c, d: low_rank(steep(low_rank(x, a, b)), c, d), X / 1e3, *HIDDEN, *OUT)
    assert result.count("mlp") == 0
    result.assert_same_result()


def test_long_chains_before_and_behind_a_projection():
    def function(x, down, up):
        for _ in range(400):
            x = torch.tanh(x) * 1.01
        x = low_rank(x, down, up)
        for _ in range(400):
            x = x + 0.001
        return x

    result = rewritten(function, X, *HIDDEN)
    assert result.count("linear") == 1
    result.assert_same_result()
