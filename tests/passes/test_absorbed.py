"""The strategy ``absorbed``: the same result in rank space, or a reason why there is no such form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional
from torch.nn.functional import linear, scaled_dot_product_attention

from flashsvd_compile import rewrite
from tests.ops.accuracy import assert_within_error_rule, relative_error
from tests.ops.regions import padding

from .builder import Rewritten, rewritten, tensor

BATCH, LENGTH, HEADS, DIM, RANK = 3, 20, 4, 16, 5
WIDTH = HEADS * DIM
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight(*shape: int, seed: int) -> Tensor:
    """Of the scale that keeps that of its input, the last dimension being summed."""
    return tensor(*shape, seed=seed, scale=shape[-1] ** -0.5)


def split(y: Tensor, heads: int = HEADS) -> Tensor:
    return y.unflatten(-1, (heads, -1)).transpose(1, 2)


def merged(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def flat(function: Callable, count: int) -> Callable:
    """A function of that many arguments, which a tracer can name, out of one of any number."""
    names, scope = ", ".join(f"a{i}" for i in range(count)), {"function": function}
    exec(f"def flat({names}):\n    return function({names})", scope)
    return scope["flat"]


def of_all_heads(
    kv_heads: int = HEADS, ranks: tuple[int, int] = (RANK, RANK), bias: bool = True, down_bias: bool = True,
    dense: tuple[str, ...] = (), core: Callable = sdpa,
) -> tuple[Callable, list[Tensor]]:  # fmt: skip
    """Keys and values by one pair of factors each, as ``f(x, context, mask, *weights)``; and the weights."""
    widths = {"q": WIDTH, "k": kv_heads * DIM, "v": kv_heads * DIM, "out": WIDTH}
    by_role = dict(zip(widths, (7, *ranks, 6), strict=True))
    weights: list[Tensor] = []
    for i, (role, width) in enumerate(widths.items()):
        rank = by_role[role]
        pair = [weight(rank, WIDTH, seed=i), *([tensor(rank, seed=i)] if down_bias else [])]
        weights += [] if role in dense else pair
        weights.append(weight(width, WIDTH if role in dense else rank, seed=i + 9))
        weights += [tensor(width, seed=i)] if bias else []

    def function(x: Tensor, context: Tensor | None, mask: Tensor | None, *weights: Tensor) -> Tensor:
        rest = list(weights)

        def project(x: Tensor, role: str) -> Tensor:
            if role not in dense:
                x = linear(x, rest.pop(0), rest.pop(0) if down_bias else None)
            return linear(x, rest.pop(0), rest.pop(0) if bias else None)

        source = x if context is None else context
        q, k, v = split(project(x, "q")), split(project(source, "k"), kv_heads), split(project(source, "v"), kv_heads)
        return project(merged(core(q, k, v, mask)), "out")

    return function, weights


def of_each_head(
    kv_heads: int = HEADS, ranks: tuple[int, int] = (RANK, RANK), bias: bool = True, core: Callable = sdpa
) -> tuple[Callable, list[Tensor]]:
    """The same by factors of each head; the output projection is dense."""
    weights: list[Tensor] = []
    for i, (heads, rank) in enumerate(zip((HEADS, kv_heads, kv_heads), (6, *ranks), strict=True)):
        weights += [
            weight(heads, rank, WIDTH, seed=i).mT.contiguous(),
            weight(heads, DIM, rank, seed=i).mT.contiguous(),
        ]
        weights += [tensor(1, heads, 1, DIM, seed=i)] if bias else []
    weights.append(weight(WIDTH, WIDTH, seed=8))

    def function(x: Tensor, context: Tensor | None, mask: Tensor | None, *weights: Tensor) -> Tensor:
        rest = list(weights)

        def project(x: Tensor) -> Tensor:
            latent = torch.einsum("bmd,hdr->bhmr", x, rest.pop(0))
            y = torch.einsum("bhmr,hrd->bhmd", latent, rest.pop(0))
            return y + rest.pop(0) if bias else y

        source = x if context is None else context
        heads = core(project(x), project(source), project(source), mask)
        return linear(merged(heads), rest.pop(0))

    return function, weights


KINDS = {"all heads": of_all_heads, "each head": of_each_head}


def absorbed(
    made: tuple[Callable, list[Tensor]],
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    q_len: int = LENGTH,
    kv_len: int | None = None,
    ulps: int = 2,
) -> Rewritten:
    """The rewritten graph, whose result is checked by the error rule."""
    function, weights = made
    x = tensor(BATCH, q_len, WIDTH, scale=1.0)
    context = [] if kv_len is None else [tensor(BATCH, kv_len, WIDTH, scale=1.0, seed=1)]
    masks = [] if mask is None else [mask]

    def of_all(x: Tensor, *rest: Tensor) -> Tensor:
        others, weights = rest[: len(context) + len(masks)], rest[len(context) + len(masks) :]
        return function(x, others[0] if context else None, others[-1] if masks else None, *weights)

    inputs = [t.to(dtype) if t.is_floating_point() else t for t in (x, *context, *masks, *weights)]
    result = rewritten(flat(of_all, len(inputs)), *inputs, strategy="absorbed")
    assert result.count("attention") == 1, result.report
    assert_within_error_rule(result.module(*inputs), of_all, tuple(inputs), ulps=ulps)
    return result


def call_of(result: Rewritten) -> dict[str, Any]:
    """The operator's arguments, tensors by their example values; it must be absorbed."""
    (call,) = result.module.graph.find_nodes(op="call_function", target=torch.ops.flashsvd.attention_v5.default)
    assert call.kwargs["strategy"] == "absorbed", result.report
    return {name: a.meta["example_value"] if isinstance(a, Node) else a for name, a in call.kwargs.items()}


MASKS = {
    "none": None,
    "padding": padding(20, 13, 7, total=LENGTH)[:, None, None],
    "left padding": padding(20, 13, 7, total=LENGTH, left=True)[:, None, None],
    "an item of nothing else": padding(20, 0, 7, total=LENGTH)[:, None, None],
    "holes and a query that sees nothing": (torch.arange(LENGTH * LENGTH).view(1, 1, LENGTH, LENGTH) % 3 > 0)
    & (torch.arange(LENGTH) != 4)[:, None],
    "additive": tensor(BATCH, HEADS, LENGTH, LENGTH, seed=3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_with_biases_everywhere(kind, mask, dtype):
    kwargs = call_of(absorbed(KINDS[kind](), MASKS[mask], dtype))
    assert kwargs.get("num_kv_heads", 1) == (1 if kind == "all heads" else HEADS)
    assert kwargs["q_up"].shape[0] == HEADS * 8, "five features, one of the bias, two of nothing"
    assert kwargs["k_up"].shape[0] == kwargs["v_up"].shape[0] == kwargs.get("num_kv_heads", 1) * 8


@pytest.mark.parametrize(("rank", "bias", "width"), [(8, False, 8), (8, True, 16), (7, True, 8), (1, False, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_of_the_rank_and_one_for_a_bias_up_to_a_multiple_of_8(kind, rank, bias, width):
    """Of rank 1 one number carries a score, and by luck it rounds well or badly in one form or the other."""
    kwargs = call_of(absorbed(KINDS[kind](ranks=(rank, rank), bias=bias), ulps=2 if rank > 1 else 8))
    assert kwargs["q_up"].shape[0] == HEADS * width


@pytest.mark.parametrize("ranks", [(2, 11), (12, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_of_different_ranks_share_the_larger(kind, ranks):
    kwargs = call_of(absorbed(KINDS[kind](ranks=ranks)))
    assert kwargs["q_up"].shape[0] == HEADS * 16


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_share_keys(kind, kv_heads):
    kwargs = call_of(absorbed(KINDS[kind](kv_heads=kv_heads), MASKS["padding"]))
    assert kwargs.get("num_kv_heads", 1) == (1 if kind == "all heads" else kv_heads)


@pytest.mark.parametrize("dense", [("q",), ("out",), ("q", "out")])
@pytest.mark.parametrize("down_bias", [False, True])
def test_dense_queries_and_output(dense, down_bias):
    absorbed(of_all_heads(dense=dense, down_bias=down_bias), MASKS["an item of nothing else"])


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_few_queries_of_a_long_context(kind, q_len):
    visible = padding(50, 31, 0, total=50)[:, None, None]
    kwargs = call_of(absorbed(KINDS[kind](), visible, q_len=q_len, kv_len=50))
    assert "context" in kwargs


CORES = {
    "causal": lambda q, k, v, mask: scaled_dot_product_attention(q, k, v, is_causal=True),
    "a cap, which a constant in the scores would pass through": lambda q, k, v, mask: (
        (5.0 * torch.tanh(q @ k.mT / 5.0)).softmax(-1) @ v
    ),
    "factors on queries and keys": lambda q, k, v, mask: sdpa(q * 0.7, k / 3, v, mask),
}


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("kind", KINDS)
def test_cores(kind, core):
    absorbed(KINDS[kind](core=CORES[core]))


def rotated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    angles = torch.arange(LENGTH)[:, None] * torch.ones(DIM)
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: Tensor) -> Tensor:
        turned = torch.cat((-x[..., DIM // 2 :], x[..., : DIM // 2]), dim=-1)
        return x * cos + turned * sin

    return scaled_dot_product_attention(rotate(q), rotate(k), v)


def normed(of_queries: bool, of_keys: bool) -> Callable:
    def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q = functional.rms_norm(q, (DIM,), eps=1e-6) if of_queries else q
        return scaled_dot_product_attention(q, functional.rms_norm(k, (DIM,), eps=1e-6) if of_keys else k, v)

    return core


def mixed() -> tuple[Callable, list[Tensor]]:
    down, up = weight(HEADS, WIDTH, RANK, seed=1), weight(HEADS, RANK, DIM, seed=2)

    def function(x, context, mask, d, u, kd, ku, w):
        k = split(linear(linear(x, kd), ku))
        v = torch.einsum("bhmr,hrd->bhmd", torch.einsum("bmd,hdr->bhmr", x, d), u)
        return linear(merged(scaled_dot_product_attention(k, k, v)), w)

    return function, [down, up, weight(RANK, WIDTH, seed=3), weight(WIDTH, RANK, seed=4), weight(WIDTH, WIDTH, seed=5)]


def of_heads_only() -> tuple[Callable, list[Tensor]]:
    def function(x, context, mask, qd, qu, kd, ku):
        q, k = split(linear(linear(x, qd), qu)), split(linear(linear(x, kd), ku))
        return merged(scaled_dot_product_attention(q, k, k)).relu()

    return function, [weight(*shape, seed=i) for i, shape in enumerate([(RANK, WIDTH), (WIDTH, RANK)] * 2)]


REFUSALS = {
    "a rotation stands between the keys' factors and the scores": lambda: of_all_heads(core=rotated),
    "a norm stands between the keys' factors and the scores": lambda: of_all_heads(core=normed(False, True)),
    "no output projection takes the second factor of the values": of_heads_only,
    "no two factors compute k": lambda: of_all_heads(dense=("k",)),
    "no two factors compute k and v": lambda: of_all_heads(dense=("k", "v")),
    "of keys and values one has factors of each head, the other of all heads together": mixed,
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_has_no_form_in_rank_space_is_computed_otherwise_and_says_so(reason):
    result = refused(REFUSALS[reason]())
    assert result.report.matches[0].reason.endswith(f"; absorbed is not offered here: {reason}")


def test_a_norm_of_the_queries_alone_is_in_the_way_too():
    result = refused(of_all_heads(core=normed(True, False)))
    assert "a norm stands between" in result.report.matches[0].reason


def refused(made: tuple[Callable, list[Tensor]]) -> Rewritten:
    function, weights = made
    inputs = (tensor(BATCH, LENGTH, WIDTH), *weights)
    of_all = flat(lambda x, *weights: function(x, None, None, *weights), len(inputs))
    result = rewritten(of_all, *inputs, strategy="absorbed")
    assert result.count("attention") == 1, result.report
    assert result.report.matches[0].strategy != "absorbed"
    result.assert_same_result()
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_changes_nothing(kind):
    result = absorbed(KINDS[kind]())
    again = rewrite(result.module, options={"strategy": "absorbed"})
    assert again.matches == []


def test_what_lifts_the_keys_is_made_once_for_the_queries_weight_and_bias():
    result = absorbed(of_each_head())
    assert result.code.count("torch.cat(") == 2, "keys' biases and values' biases"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_change_after_the_rewrite_are_seen(kind):
    result = absorbed(KINDS[kind]())
    changed = [result.inputs[0], *(value + 0.1 for value in result.inputs[1:])]
    torch.testing.assert_close(result.module(*changed), result.function(*changed))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_factor_and_bias(kind):
    result = absorbed(KINDS[kind](), MASKS["padding"])

    def gradients(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in result.inputs]
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        return list(torch.autograd.grad(function(*leaves).square().sum(), needed))

    exact = gradients(result.function, torch.float64)
    for ours, plain, right in zip(
        gradients(result.module, torch.float32), gradients(result.function, torch.float32), exact, strict=True
    ):
        if right.norm() < 1e-9:  # a bias of the keys adds one number to all scores of a query
            assert ours.norm() < 1e-3
        else:
            assert relative_error(ours, right) <= max(1.25 * relative_error(plain, right), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    function, weights = KINDS[kind]()
    x = tensor(BATCH, LENGTH, WIDTH)
    of_all = flat(lambda x, *weights: function(x, None, None, *weights), 1 + len(weights))
    exact = of_all(*(value.double() for value in (x, *weights)))
    with torch.autocast("cpu", torch.bfloat16):
        result = rewritten(of_all, x, *weights, strategy="absorbed")
        assert call_of(result)["q_up"].dtype == torch.bfloat16
        ours, plain = result.module(x, *weights), of_all(x, *weights)
    assert ours.dtype == plain.dtype == torch.bfloat16
    assert relative_error(ours, exact) <= 1.25 * relative_error(plain, exact)
