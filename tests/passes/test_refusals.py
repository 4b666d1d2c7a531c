"""What must be left alone is left alone, with its reason, and still computes what it did."""

import operator

import pytest
import torch
from torch.nn import functional
from torch.nn.functional import linear

from flashsvd_compile import RefusalReason, last_report, rewrite

from .builder import call, graph_of, rewritten, tensor

IN, WIDTH, RANK, OUT = 24, 32, 4, 20
X = tensor(2, 5, IN)
DOWN, UP, BIAS = tensor(RANK, IN, seed=1), tensor(OUT, RANK, seed=2), tensor(OUT, seed=3)
MLP = (tensor(RANK, IN, seed=4), tensor(WIDTH, RANK, seed=5), tensor(RANK, WIDTH, seed=6), tensor(IN, RANK, seed=7))


def mlp(x, d1, u1, d2, u2):
    return linear(linear(functional.gelu(linear(linear(x, d1), u1)), d2), u2)


def mutates_the_input(x, down, up):
    h = linear(x, down)
    x.mul_(2.0)
    return linear(h, up)


def zeroes_the_input_between_the_factors(x, u, v):
    h = x @ v
    x.mul_(0)
    return h @ u


def mutates_the_input_by_an_operator(x, down, up):
    h = linear(x, down)
    call(operator.iadd, x, 1)
    return linear(h, up), x


def mutates_the_input_by_an_index(x, down, up):
    h = linear(x, down)
    call(operator.setitem, x, 0, 0.0)
    return linear(h, up)


def mutates_the_input_by_out(x, down, up):
    h = linear(x, down)
    torch.exp(x, out=x)
    return linear(h, up)


def mutates_a_weight(x, down, up):
    h = linear(x, down)
    down.zero_()
    return linear(h, up)


def mutates_a_view_of_the_input(x, down, up):
    flat = x.view(-1)
    h = linear(x, down)
    flat.mul_(0.0)
    return linear(h, up)


def mutates_a_view_of_the_input_made_before(x, down, up):
    first = x[0]
    h = linear(x, down)
    first.add_(1.0)
    return linear(h, up)


def mutates_what_the_input_is_a_view_of(x, down, up):
    part = x[:, 1:]
    h = linear(part, down)
    x.mul_(0.5)
    return linear(h, up)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (mutates_the_input, RefusalReason.MUTATED),
        (zeroes_the_input_between_the_factors, RefusalReason.MUTATED),
        (mutates_the_input_by_an_operator, RefusalReason.MUTATED),
        (mutates_the_input_by_an_index, RefusalReason.MUTATED),
        (mutates_the_input_by_out, RefusalReason.MUTATED),
        (mutates_a_weight, RefusalReason.MUTATED),
        (mutates_a_view_of_the_input, RefusalReason.ALIASED),
        (mutates_a_view_of_the_input_made_before, RefusalReason.ALIASED),
        (mutates_what_the_input_is_a_view_of, RefusalReason.ALIASED),
    ],
)
def test_a_write_between_the_first_and_the_last_node(function, reason):
    weights = (tensor(RANK, OUT, seed=8), tensor(IN, RANK, seed=9)) if "factors" in function.__name__ else (DOWN, UP)
    result = rewritten(function, X, *weights)
    assert result.report.matches == []
    assert result.reasons == [reason]
    result.assert_same_result()


def test_a_write_before_or_after_the_region_does_no_harm():
    def function(x, down, up):
        x = x * 1.0
        x.add_(1.0)
        y = linear(linear(x, down), up)
        x.mul_(0.0)
        y.mul_(2.0)
        return y, x

    result = rewritten(function, X, DOWN, UP)
    assert result.count("linear") == 1
    result.assert_same_result()


def zeroes_a_row(y):
    y[0].zero_()


WRITES = {
    "a row": zeroes_a_row,
    "by index": lambda y: call(operator.setitem, y, 0, 0.0),
    "flattened": lambda y: y.view(-1).mul_(2.0),
    "transposed": lambda y: y.transpose(0, 1).add_(1.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_a_product_of_weights(write):
    """Which is no longer that of its factors."""

    def function(x, down, up):
        weight = up @ down
        WRITES[write](weight)
        return linear(x, weight)

    result = rewritten(function, X, DOWN, UP)
    assert result.reasons == [RefusalReason.MUTATED] or result.reasons == [RefusalReason.ALIASED]
    result.assert_same_result()


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_what_a_rule_before_has_replaced(write):
    def function(x, d1, u1, d2, u2, down, up):
        y = mlp(x, d1, u1, d2, u2)
        hidden = linear(y, down)
        WRITES[write](y)
        return linear(hidden, up)

    result = rewritten(function, X, *MLP, DOWN, UP)
    assert (result.count("mlp"), result.count("linear")) == (1, 0)
    result.assert_same_result()
    assert all("storage" not in node.meta for node in result.module.graph.nodes)


def scales_queries_that_are_keys_too(x, down, up):
    """Two views of one projection; one is overwritten."""
    both = linear(linear(x, down), up)
    q, k, v = (heads(y) for y in (both, both, linear(linear(x, down), up)))
    q.mul_(0.5)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def scales_queries_that_overlap_keys(x, down, up):
    packed = linear(linear(x, down), torch.cat((up, up)))
    q, k, v = (heads(packed[..., start : start + OUT]) for start in (0, 8, OUT))
    q.mul_(0.5)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def activates_a_gate_that_is_read_by_another_name(x, down, up):
    gate = linear(linear(x, down), up)
    alias = gate.view(-1, OUT)
    return linear(linear(functional.silu(gate, inplace=True) * alias.view(2, 5, OUT), up.t()), down.t())


def keeps_keys_that_are_scaled(x, down, up):
    q, k, v = (linear(linear(x, down), up) for _ in range(3))
    kept = k.view(2, 5, 4, OUT // 4)
    k = call(operator.imul, k, 0.5)
    return functional.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2), kept


def keeps_keys_that_are_scaled_through_a_view(x, down, up):
    q, k, v = (linear(linear(x, down), up) for _ in range(3))
    scaled = heads(k)
    scaled.mul_(0.25)
    return functional.scaled_dot_product_attention(heads(q), scaled, heads(v)).transpose(1, 2).flatten(2), k


def heads(y):
    return y.view(2, 5, 4, OUT // 4).transpose(1, 2)


@pytest.mark.parametrize(
    "function",
    [
        scales_queries_that_are_keys_too,
        scales_queries_that_overlap_keys,
        activates_a_gate_that_is_read_by_another_name,
        keeps_keys_that_are_scaled,
        keeps_keys_that_are_scaled_through_a_view,
    ],
)
def test_a_write_within_that_shows_by_another_name(function):
    result = rewritten(function, X, DOWN, UP)
    assert RefusalReason.ALIASED in result.reasons
    assert result.count("attention") == result.count("mlp") == 0
    result.assert_same_result()


def second_factor_into(x, down, up, e):
    torch.matmul(linear(x, down), up.t(), out=e)
    return e + 1


def bias_into(x, down, up, e):
    total = torch.add(linear(linear(x, down), up), up[:, 0], out=e)
    return total.sum() + e


def hidden_layer_into(x, down, up, e):
    hidden = torch.matmul(linear(x, down), up.t(), out=e)
    return linear(linear(functional.gelu(hidden), up.t()), down.t()) + e.sum()


@pytest.mark.parametrize("function", [second_factor_into, bias_into, hidden_layer_into])
def test_a_result_that_is_written_elsewhere(function):
    """What ``out=`` names is read by its own name, or belongs to the caller."""
    result = rewritten(function, X, DOWN, UP, torch.zeros(2, 5, OUT))
    assert RefusalReason.MUTATED in result.reasons
    result.assert_same_result()
    found, expected = torch.zeros(2, 5, OUT), torch.zeros(2, 5, OUT)
    result.module(X, DOWN, UP, found)
    function(X, DOWN, UP, expected)
    torch.testing.assert_close(found, expected)


def test_a_write_within_that_nothing_else_sees():
    def function(x, down, up):
        q, k, v = (heads(linear(linear(x, down), up)) for _ in range(3))
        q.mul_(0.5)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    result = rewritten(function, X, DOWN, UP)
    assert result.count("attention") == 1
    result.assert_same_result()


def test_a_write_to_an_intermediate_by_a_view():
    def function(x, down, up):
        h = linear(x, down)
        h[0].mul_(2.0)
        return linear(h, up)

    result = rewritten(function, X, DOWN, UP)
    assert result.report.matches == []
    assert result.reasons == [RefusalReason.OTHER_USER]
    result.assert_same_result()


@pytest.mark.parametrize("place", ["output", "another operation"])
def test_a_rank_space_intermediate_with_another_user(place):
    def function(x, down, up):
        h = linear(x, down)
        return (linear(h, up), h) if place == "output" else (linear(h, up), h.sum())

    result = rewritten(function, X, DOWN, UP)
    assert result.report.matches == []
    assert result.reasons == [RefusalReason.OTHER_USER]
    assert "also used by" in result.report.refusals[0].sentence
    result.assert_same_result()


def test_a_hidden_tensor_with_another_user_costs_the_mlp_but_not_its_projections():
    def function(x, d1, u1, d2, u2):
        hidden = functional.gelu(linear(linear(x, d1), u1))
        return linear(linear(hidden, d2), u2), hidden

    result = rewritten(function, X, *MLP)
    assert result.count("mlp") == 0
    assert result.count("linear") == 2
    assert result.reasons == [RefusalReason.OTHER_USER]
    result.assert_same_result()


@pytest.mark.parametrize("rank", [OUT, OUT + 1, 3 * IN])
def test_two_linear_layers_without_a_bottleneck_are_not_low_rank(rank):
    result = rewritten(lambda x, d, u: linear(linear(x, d), u), X, tensor(rank, IN), tensor(OUT, rank))
    assert result.report.matches == []
    assert result.reasons == [RefusalReason.RANK_NOT_LOW]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, a, b: linear(x, w) + linear(linear(x, a), b),
        lambda x, w, a, b: linear(linear(x, a), b) + linear(x, w),
        lambda x, w, a, b: linear(x, w) + 2.0 * linear(linear(x, a), b),
        lambda x, w, a, b: linear(x, w) + linear(linear(functional.dropout(x, 0.1, training=False), a), b) * 0.5,
        lambda x, w, a, b: torch.add(linear(x, w), linear(linear(x, a), b) / 4.0),
    ],
)
def test_base_plus_lora(function):
    result = rewritten(function, X, tensor(OUT, IN), DOWN, UP)
    assert result.report.matches == []
    assert result.reasons == [RefusalReason.LORA_SUM]
    result.assert_same_result()


@pytest.mark.parametrize("arguments", [{}, {"training": True}, {"p": 0.2}])
def test_dropout_that_may_be_on(arguments):
    result = rewritten(lambda x, d, u: linear(functional.dropout(linear(x, d), **arguments), u), X, DOWN, UP)
    assert result.report.matches == []
    assert result.reasons == [RefusalReason.LIVE_DROPOUT]


def test_dropout_that_may_be_on_inside_an_mlp():
    def function(x, d1, u1, d2, u2):
        return linear(linear(functional.dropout(functional.gelu(linear(linear(x, d1), u1)), 0.1), d2), u2)

    result = rewritten(function, X, *MLP)
    assert result.count("mlp") == 0
    assert result.count("linear") == 2
    assert RefusalReason.LIVE_DROPOUT in result.reasons


def test_float64_is_left_to_the_inner_backend():
    result = rewritten(mlp, X.double(), *(weight.double() for weight in MLP))
    assert result.report.matches == []
    assert set(result.reasons) == {RefusalReason.UNSUPPORTED_DTYPE}


def test_dtypes_mixed_within_a_region():
    def function(x, down, up):
        return linear(linear(x, down).to(torch.bfloat16), up)

    result = rewritten(function, X, DOWN, UP.bfloat16())
    assert result.report.matches == []


def test_a_narrower_dtype_inside_a_region():
    def function(x, d1, u1, d2, u2):
        hidden = linear(linear(x, d1), u1).to(torch.bfloat16)
        return linear(linear(functional.gelu(hidden).to(torch.float32), d2), u2)

    result = rewritten(function, X, *MLP)
    assert result.count("mlp") == 0
    assert result.count("linear") == 2
    assert result.reasons == [RefusalReason.UNSUPPORTED_DTYPE]
    result.assert_same_result()


def test_a_device_without_an_implementation():
    on_meta = [value.to("meta") for value in (X, *MLP)]
    result = rewritten(mlp, *on_meta)
    assert result.report.matches == []
    assert set(result.reasons) == {RefusalReason.UNSUPPORTED_DEVICE}


def test_a_tensor_subclass():
    class Tagged(torch.Tensor):
        pass

    graph = graph_of(mlp, X, *MLP)
    for node in graph.graph.nodes:
        if node.op == "placeholder" and node.name == "x":
            node.meta["example_value"] = X.as_subclass(Tagged)
    report = rewrite(graph)
    assert report.count("mlp") == 0
    assert {refusal.reason for refusal in report.refusals} == {RefusalReason.TENSOR_SUBCLASS}


def test_nothing_low_rank_means_nothing_reported():
    result = rewritten(lambda x, w: functional.gelu(linear(x, w)), X, tensor(OUT, IN))
    assert result.report.matches == []
    assert result.report.refusals == []
    assert "no low-rank projection found" in str(result.report)


def test_a_write_to_a_weight_after_a_view_of_it_was_taken():
    def function(x, u, down, up):
        product = up @ down
        down.mul_(2.0)
        return linear(x, product)

    result = rewritten(function, X, UP, DOWN, UP)
    assert result.report.matches == []
    assert result.reasons == [RefusalReason.MUTATED]
    result.assert_same_result()


def test_a_write_to_an_input_that_was_a_factor():
    def function(x, up):
        product = up @ x
        x.mul_(2.0)
        return linear(x, product)

    result = rewritten(function, DOWN, UP)
    assert result.report.matches == []
    assert result.reasons == [RefusalReason.MUTATED]
    result.assert_same_result()


def untouched(x):
    return x


def assert_refused_with_a_write_between_its_factors(write, reason):
    """A pair of factors between which ``write`` overwrites their input."""

    def function(x, down, up):
        h = linear(x, down)
        write(x)
        return linear(h, up)

    result = rewritten(function, X, DOWN, UP)
    assert result.report.matches == []
    assert result.reasons == [reason]
    result.assert_same_result()


@pytest.mark.parametrize(
    "write",
    [
        lambda x: functional.hardtanh(x, -0.1, 0.1, True),
        lambda x: functional.hardtanh(x, inplace=True),
        lambda x: torch.sigmoid_(x),
        lambda x: x.zero_(),
        lambda x: torch.ops.aten.mul_.Tensor(x, 2.0),
        lambda x: torch.ops.aten.mul_(x, 2.0),
        lambda x: call(untouched, x),
        lambda x: call(operator.imod, x, 0.5),
        lambda x: functional.relu(input=x, inplace=True),
        lambda x: torch.clamp_(input=x, min=0.5),
    ],
)
def test_writes_in_every_spelling_and_functions_that_may_do_anything(write):
    assert_refused_with_a_write_between_its_factors(write, RefusalReason.MUTATED)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: functional.embedding(torch.tensor([0, 1]), x[0], max_norm=0.1),
        lambda x: functional.embedding_bag(torch.tensor([[0, 1]]), x[1], None, 0.1),
        lambda x: functional.batch_norm(torch.ones(4, 5), x[0, :, 0], x[0, :, 1] + 1, training=True),
        lambda x: functional.instance_norm(torch.ones(2, 5, 3), running_mean=x[0, :, 0], running_var=torch.ones(5)),
        lambda x: torch.ops.aten.batch_norm(
            torch.ones(4, 5), None, None, x[0, :, 0], x[0, :, 1], True, 0.5, 0.1, False
        ),
    ],
)
def test_writes_by_functions_that_do_not_look_like_it(write):
    """Norms bounded in an embedding's weight, running statistics; here in a view of what the region reads."""
    assert_refused_with_a_write_between_its_factors(write, RefusalReason.ALIASED)


def doubled(x):
    return x * 2


def test_what_a_function_that_may_do_anything_returns_is_not_read_instead_of_its_argument():
    def function(x, down, up):
        moved = x + 1
        return call(doubled, moved), linear(linear(moved, down), up)

    result = rewritten(function, X, DOWN, UP)
    assert result.count("linear") == 1
    result.assert_same_result()


def test_lookups_of_tied_embeddings_are_no_writes():
    """Without a bound of their norms."""

    def function(x, down, up):
        h = linear(x, down)
        tokens = functional.embedding(torch.tensor([0, 1]), up)
        return linear(h, up) + tokens.sum()

    result = rewritten(function, X, DOWN, UP)
    assert (result.count("linear"), result.reasons) == (1, [])
    result.assert_same_result()


def test_nested_tensors_are_left_alone():
    pair = torch.nn.Sequential(torch.nn.Linear(IN, RANK, False), torch.nn.Linear(RANK, OUT))
    x = torch.nested.nested_tensor([torch.randn(3, IN), torch.randn(5, IN)], layout=torch.jagged)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(pair, backend="flashsvd", options={"strategy": "streamed", "inner": "aot_eager"})
        torch.testing.assert_close(compiled(x).values(), pair(x).values())
    report = last_report()
    assert report is not None
    assert [refusal.reason for refusal in report.refusals] == [RefusalReason.TENSOR_SUBCLASS]
