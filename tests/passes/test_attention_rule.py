"""Attention is found in every spelling of its heads, its packing, its sharing of keys and its scores."""

import math
import operator

import pytest
import torch
from torch.nn import functional
from torch.nn.functional import linear, scaled_dot_product_attention

from flashsvd_compile import RefusalReason
from flashsvd_compile.passes import attention as attention_rule
from flashsvd_compile.planner import plan_attention

from .builder import rewritten, tensor

BATCH, LENGTH, HEADS, DIM = 2, 6, 4, 8
WIDTH = HEADS * DIM
X = tensor(BATCH, LENGTH, WIDTH)
RANKS = {"q": 3, "k": 5, "v": 6, "out": 7}
Q, K, V, OUT = (
    (tensor(rank, WIDTH, seed=i), tensor(WIDTH, rank, seed=10 + i)) for i, rank in enumerate(RANKS.values())
)
ALL = (*Q, *K, *V, *OUT)


def low_rank(x, down, up, bias=None):
    return linear(linear(x, down), up, bias)


def heads_of(y, heads=HEADS):
    return y.view(BATCH, -1, heads, DIM).transpose(1, 2)


def merge(heads):
    return heads.transpose(1, 2).reshape(BATCH, LENGTH, WIDTH)


def sdpa(q, k, v):
    return scaled_dot_product_attention(q, k, v)


def attention(split=heads_of, core=sdpa, merge=merge):
    """Self-attention whose parts can be exchanged."""

    def function(x, qd, qu, kd, ku, vd, vu, od, ou):
        q, k, v = (split(low_rank(x, down, up)) for down, up in ((qd, qu), (kd, ku), (vd, vu)))
        return low_rank(merge(core(q, k, v)), od, ou)

    return function


def assert_whole_region(result, ranks=RANKS):
    assert result.count("attention") == 1, result.report
    assert result.count("linear") == 0
    assert result.report.matches[0].ranks == ranks
    result.assert_same_result()
    (call,) = result.module.graph.find_nodes(op="call_function", target=torch.ops.flashsvd.attention_v5.default)
    return call.kwargs


SPLITS = {
    "view, transpose": heads_of,
    "view of a tuple": lambda y: y.view((BATCH, LENGTH, HEADS, DIM)).transpose(1, 2),
    "inferred heads": lambda y: y.view(BATCH, LENGTH, -1, DIM).transpose(2, 1),
    "reshape, permute": lambda y: y.reshape(BATCH, LENGTH, HEADS, DIM).permute(0, 2, 1, 3),
    "permute of a tuple": lambda y: torch.reshape(y, (BATCH, LENGTH, HEADS, DIM)).permute((0, 2, 1, 3)),
    "unflatten": lambda y: y.unflatten(-1, (HEADS, DIM)).transpose(-3, -2),
    "movedim": lambda y: y.unflatten(2, (HEADS, -1)).movedim(2, 1),
    "swapaxes, contiguous": lambda y: y.view(BATCH, LENGTH, HEADS, DIM).swapaxes(1, 2).contiguous(),
    "chunks of heads": lambda y: torch.stack(y.chunk(HEADS, dim=-1), dim=1),
}


@pytest.mark.parametrize("split", [name for name in SPLITS if name != "chunks of heads"])
def test_every_way_to_split_heads(split):
    kwargs = assert_whole_region(rewritten(attention(SPLITS[split]), X, *ALL))
    assert kwargs["num_heads"] == kwargs["num_kv_heads"] == HEADS
    assert kwargs["scale"] == pytest.approx(1 / math.sqrt(DIM))


MERGES = {
    "transpose, reshape": merge,
    "transpose, contiguous, view": lambda h: h.transpose(1, 2).contiguous().view(BATCH, LENGTH, WIDTH),
    "permute, flatten": lambda h: h.permute(0, 2, 1, 3).flatten(2),
    "permute, reshape to inferred": lambda h: h.permute(0, 2, 1, 3).reshape(BATCH, -1, WIDTH),
    "twice contiguous": lambda h: h.transpose(1, 2).contiguous().reshape(BATCH, LENGTH, -1).contiguous(),
    "a reshape that changes nothing": lambda h: merge(h.reshape(BATCH, -1, LENGTH, DIM)),
    "dropout off": lambda h: functional.dropout(merge(h), 0.1, training=False),
}


@pytest.mark.parametrize("spelling", MERGES)
def test_every_way_to_concatenate_heads(spelling):
    assert_whole_region(rewritten(attention(merge=MERGES[spelling]), X, *ALL))


CORES = {
    "positional": lambda q, k, v: scaled_dot_product_attention(q, k, v, None, 0.0, False),
    "keywords": lambda q, k, v: scaled_dot_product_attention(query=q, key=k, value=v, dropout_p=0.0, is_causal=False),
    "explicit scale": lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=0.3),
    "scaled queries": lambda q, k, v: scaled_dot_product_attention(q * 0.3, k, v, scale=1.0),
    "divided queries": lambda q, k, v: scaled_dot_product_attention(q / 3, k, v),
    "scaled on both sides": lambda q, k, v: scaled_dot_product_attention(q * 0.5, 0.5 * k, v),
    "causal": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    "softmax": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(DIM), dim=-1) @ v,
    "softmax by methods": lambda q, k, v: q.matmul(k.transpose(2, 3)).mul(0.25).softmax(-1).matmul(v),
    "softmax of scaled queries": lambda q, k, v: torch.matmul(functional.softmax((q * 0.25) @ k.mT, dim=3), v),
    "softmax in float32": lambda q, k, v: (
        functional.softmax(q @ k.transpose(2, 3) * 0.25, dim=-1, dtype=torch.float32).to(torch.float32) @ v
    ),
    "softmax, dropout off": lambda q, k, v: (
        functional.dropout((q @ k.transpose(2, 3)).softmax(-1), p=0.1, training=False) @ v
    ),
    "softmax without scale": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), -1) @ v,
}


@pytest.mark.parametrize("spelling", CORES)
def test_every_spelling_of_the_core(spelling):
    kwargs = assert_whole_region(rewritten(attention(core=CORES[spelling]), X, *ALL))
    assert kwargs.get("window_right", -1) == (0 if spelling == "causal" else -1)


CASTS = {
    "to": lambda weights, like: weights.to(like.dtype),
    "type": lambda weights, like: weights.type(like.dtype),
    "type_as": lambda weights, like: weights.type_as(like),
    "half": lambda weights, like: weights.half(),
}


@pytest.mark.parametrize("spelling", CASTS)
def test_every_cast_of_the_weights(spelling):
    def core(q, k, v):
        return CASTS[spelling](torch.softmax((q @ k.mT).float() * 0.25, -1), q) @ v

    result = rewritten(attention(core=core), *(tensor.half() for tensor in (X, *ALL)))
    assert (result.count("attention"), result.reasons) == (1, [])


OTHER_WEIGHTS = {
    "a softmax times a mask of heads": lambda q, k, v: (
        ((q @ k.mT).softmax(-1) * torch.arange(1.0, HEADS + 1).view(1, HEADS, 1, 1)) @ v
    ),
    "a softmax without its NaN": lambda q, k, v: torch.nan_to_num((q @ k.mT).softmax(-1)) @ v,
    "sigmoids": lambda q, k, v: torch.sigmoid(q @ k.mT * 0.25) @ v,
    "squares": lambda q, k, v: torch.relu(q @ k.mT) ** 2 @ v,
    "scores": lambda q, k, v: (q @ k.mT).tril() @ v,
}


@pytest.mark.parametrize("weights", OTHER_WEIGHTS)
def test_values_weighted_by_something_else_are_reported(weights):
    result = rewritten(attention(core=OTHER_WEIGHTS[weights]), X, *ALL)
    assert (result.count("attention"), result.count("linear")) == (0, 4)
    assert result.reasons == [RefusalReason.UNSUPPORTED_ATTENTION]
    assert "weights values by more than a softmax, or by something else" in result.report.refusals[0].sentence
    result.assert_same_result()


def test_attention_without_weights_of_keys_is_not_reported():
    result = rewritten(attention(core=lambda q, k, v: q @ (k.mT @ v)), X, *ALL)
    assert (result.count("linear"), result.reasons) == (4, [])


ROUNDED = {
    "scores": lambda q, k, v: torch.div(q @ k.mT, 0.1, rounding_mode="floor").softmax(-1) @ v,
    "capped scores": lambda q, k, v: (torch.tanh((q @ k.mT).div(0.1, rounding_mode="trunc")) * 2).softmax(-1) @ v,
    "queries": lambda q, k, v: scaled_dot_product_attention(torch.div(q, 0.1, rounding_mode="trunc"), k, v),
    "keys": lambda q, k, v: scaled_dot_product_attention(q, k.div(0.1, rounding_mode="floor"), v),
}


@pytest.mark.parametrize("spelling", ROUNDED)
def test_a_division_that_rounds_is_no_scale(spelling):
    result = rewritten(attention(core=ROUNDED[spelling]), X, *ALL)
    assert result.count("attention") == 0
    result.assert_same_result()


# Batch and heads in one dimension, and by einsum


def items_of(y, length=LENGTH):
    return y.view(BATCH, length, HEADS, DIM).transpose(1, 2).reshape(BATCH * HEADS, length, DIM)


def merge_items(items):
    return items.view(BATCH, HEADS, LENGTH, DIM).transpose(1, 2).reshape(BATCH, LENGTH, WIDTH)


ITEM_CORES = {
    "bmm": lambda q, k, v: torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.25, dim=-1), v),
    "@": lambda q, k, v: ((q * 0.25) @ k.mT).softmax(-1) @ v,
    "baddbmm": lambda q, k, v: (
        torch.baddbmm(torch.zeros(8, LENGTH, LENGTH), q, k.mT, beta=0, alpha=0.25).softmax(-1).bmm(v)
    ),
    "viewed as batch and heads for the softmax": lambda q, k, v: (
        torch.bmm(q, k.mT).view(BATCH, HEADS, LENGTH, LENGTH).mul(0.5).softmax(-1).view(-1, LENGTH, LENGTH) @ v
    ),
}


@pytest.mark.parametrize("spelling", ITEM_CORES)
def test_batch_and_heads_in_one_dimension(spelling):
    assert_whole_region(rewritten(attention(items_of, ITEM_CORES[spelling], merge_items), X, *ALL))


def test_a_mask_added_where_batch_and_heads_are_apart():
    def core(mask):
        def attend(q, k, v):
            scores = torch.bmm(q, k.mT).view(BATCH, HEADS, LENGTH, LENGTH) + mask
            return torch.bmm(scores.softmax(-1).view(BATCH * HEADS, LENGTH, LENGTH), v)

        return attend

    def function(x, mask, a, b, c, d, e, f, g, h):
        return attention(items_of, core(mask), merge_items)(x, a, b, c, d, e, f, g, h)

    assert "mask" in assert_whole_region(rewritten(function, X, BIAS, *ALL))


def test_one_batch_item_of_many_heads_and_many_items_of_one_head():
    core = ITEM_CORES["bmm"]

    def many_heads(x, a, b, c, d, e, f, g, h):
        projected = (low_rank(x, down, up) for down, up in ((a, b), (c, d), (e, f)))
        q, k, v = (y.view(LENGTH, HEADS, DIM).transpose(0, 1) for y in projected)
        return low_rank(core(q, k, v).transpose(0, 1).reshape(1, LENGTH, WIDTH), g, h)

    def one_head(x, a, b, c, d, e, f, g, h):
        return low_rank(core(low_rank(x, a, b), low_rank(x, c, d), low_rank(x, e, f)), g, h)

    assert assert_whole_region(rewritten(many_heads, X[:1], *ALL))["num_heads"] == HEADS
    assert assert_whole_region(rewritten(one_head, X, *ALL)).get("num_heads", 1) == 1


def split_only(y):
    return y.view(BATCH, LENGTH, HEADS, DIM)


EINSUMS = {
    "bqhd": ("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"),
    "other letters and spaces": ("b i h d, b j h d -> b h i j", "b h i j, b j h d -> b i h d"),
    "keys first": ("bkhd,bqhd->bhqk", "bhqk,bkhd->bqhd"),
}


@pytest.mark.parametrize("spelling", EINSUMS)
def test_einsum(spelling):
    scores, weighted = EINSUMS[spelling]

    def core(q, k, v):
        q, k = (k, q) if spelling == "keys first" else (q, k)
        return torch.einsum(weighted, torch.softmax(torch.einsum(scores, q, k) * 0.3, dim=-1), v)

    assert_whole_region(rewritten(attention(split_only, core, lambda y: y.flatten(2)), X, *ALL))


def test_heads_concatenated_to_a_matrix():
    def function(x, a, b, c, d, e, f):
        q, k, v = (heads_of(low_rank(x, down, up)) for down, up in ((a, b), (c, d), (e, f)))
        return sdpa(q, k, v).transpose(1, 2).reshape(-1, WIDTH).relu()

    result = rewritten(function, X, *ALL[:-2])
    assert_whole_region(result, {"q": 3, "k": 5, "v": 6})


def test_an_output_projection_of_a_matrix():
    def function(x, a, b, c, d, e, f, g, h):
        q, k, v = (heads_of(low_rank(x, down, up)) for down, up in ((a, b), (c, d), (e, f)))
        return low_rank(sdpa(q, k, v).transpose(1, 2).reshape(-1, WIDTH), g, h).relu()

    assert_whole_region(rewritten(function, X, *ALL))


def test_keys_of_one_item_for_all_are_refused():
    def function(x, context, a, b, c, d, e, f, g, h):
        q = heads_of(low_rank(x, a, b))
        k, v = (low_rank(context, s, t).view(1, LENGTH, HEADS, DIM).transpose(1, 2) for s, t in ((c, d), (e, f)))
        return low_rank(merge(sdpa(q, k, v)), g, h)

    result = rewritten(function, X, tensor(1, LENGTH, WIDTH, seed=60), *ALL)
    assert result.count("attention") == 0
    assert result.count("linear") == 4
    result.assert_same_result()


MASK = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.3
MASK[..., 0] = True
BIAS = tensor(1, HEADS, LENGTH, LENGTH)


@pytest.mark.parametrize("mask", [MASK, BIAS, BIAS[0], MASK[:1], BIAS[:, :, :1]])
def test_a_mask_without_structure_is_passed_on(mask):
    def function(x, mask, *weights):
        return attention(core=lambda q, k, v: scaled_dot_product_attention(q, k, v, mask))(x, *weights)

    def flat(x, mask, a, b, c, d, e, f, g, h):
        return function(x, mask, a, b, c, d, e, f, g, h)

    assert "mask" in assert_whole_region(rewritten(flat, X, mask, *ALL))


@pytest.mark.parametrize("in_front", [True, False])
def test_a_bias_added_to_spelled_out_scores(in_front):
    def core(bias):
        def scores(q, k):
            product = q @ k.transpose(2, 3) * 0.25
            return bias + product if in_front else product + bias

        return lambda q, k, v: torch.softmax(scores(q, k), dim=-1) @ v

    def function(x, bias, a, b, c, d, e, f, g, h):
        return attention(core=core(bias))(x, a, b, c, d, e, f, g, h)

    kwargs = assert_whole_region(rewritten(function, X, BIAS, *ALL))
    assert kwargs["scale"] == 0.25


def test_a_bias_that_is_scaled_together_with_the_scores_is_not_guessed():
    def function(x, bias, a, b, c, d, e, f, g, h):
        core = lambda q, k, v: torch.softmax((q @ k.transpose(2, 3) + bias) * 0.25, dim=-1) @ v  # noqa: E731
        return attention(core=core)(x, a, b, c, d, e, f, g, h)

    result = rewritten(function, X, BIAS, *ALL)
    assert result.count("attention") == 0
    assert result.count("linear") == 4
    assert result.reasons == [RefusalReason.UNSUPPORTED_ATTENTION]
    result.assert_same_result()


def test_live_attention_dropout():
    core = lambda q, k, v: scaled_dot_product_attention(q, k, v, dropout_p=0.1)  # noqa: E731
    result = rewritten(attention(core=core), X, *ALL)
    assert result.count("attention") == 0
    assert result.reasons == [RefusalReason.LIVE_DROPOUT]


@pytest.mark.parametrize("length", [HEADS, HEADS + 1])
def test_a_rotation_of_each_head_by_an_angle_of_its_own(length):
    """Tables ``[heads, dim]`` look like ``[len, dim]`` where there are as many heads as positions."""

    def turned(x):
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    def function(x, cos, sin, qd, qu, kd, ku, vd, vu):
        pairs = ((qd, qu), (kd, ku), (vd, vu))
        q, k, v = (low_rank(x, down, up).view(BATCH, length, HEADS, DIM).transpose(0, 1) for down, up in pairs)
        q, k = (each * cos + turned(each) * sin for each in (q, k))
        y = sdpa(*(each.permute(1, 2, 0, 3) for each in (q, k, v)))
        return y.transpose(1, 2).flatten(2)

    angles = tensor(HEADS, DIM // 2, seed=31).repeat(1, 2)
    x = tensor(BATCH, length, WIDTH, seed=32)
    result = rewritten(function, x, angles.cos(), angles.sin(), *ALL[:6], strategy="streamed")
    assert result.count("attention") == 0 and result.count("linear") == 3
    result.assert_same_result()


# Keys shared by groups of query heads

KV_HEADS = 2
K_SHARED, V_SHARED = (
    (tensor(5, WIDTH, seed=20), tensor(KV_HEADS * DIM, 5, seed=21)),
    (tensor(6, WIDTH, seed=22), tensor(KV_HEADS * DIM, 6, seed=23)),
)


def repeat_kv(kv):
    expanded = kv[:, :, None, :, :].expand(BATCH, KV_HEADS, HEADS // KV_HEADS, LENGTH, DIM)
    return expanded.reshape(BATCH, HEADS, LENGTH, DIM)


REPEATS = {
    "expand, reshape": repeat_kv,
    "unsqueeze, expand, flatten": lambda kv: kv.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
    "repeat_interleave": lambda kv: kv.repeat_interleave(2, dim=1),
    "torch.repeat_interleave": lambda kv: torch.repeat_interleave(kv, 2, 1),
}


def grouped(core):
    def function(x, qd, qu, kd, ku, vd, vu, od, ou):
        q, k, v = heads_of(low_rank(x, qd, qu)), low_rank(x, kd, ku), low_rank(x, vd, vu)
        return low_rank(merge(core(q, heads_of(k, KV_HEADS), heads_of(v, KV_HEADS))), od, ou)

    return function


@pytest.mark.parametrize("spelling", REPEATS)
def test_grouped_queries_by_repeated_keys(spelling):
    repeat = REPEATS[spelling]
    core = lambda q, k, v: scaled_dot_product_attention(q, repeat(k), repeat(v))  # noqa: E731
    kwargs = assert_whole_region(rewritten(grouped(core), X, *Q, *K_SHARED, *V_SHARED, *OUT))
    assert (kwargs["num_heads"], kwargs["num_kv_heads"]) == (HEADS, KV_HEADS)


def test_grouped_queries_by_enable_gqa():
    core = lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
    kwargs = assert_whole_region(rewritten(grouped(core), X, *Q, *K_SHARED, *V_SHARED, *OUT))
    assert (kwargs["num_heads"], kwargs["num_kv_heads"]) == (HEADS, KV_HEADS)


def test_heads_repeated_in_the_other_order_are_refused():
    core = lambda q, k, v: scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))  # noqa: E731
    result = rewritten(grouped(core), X, *Q, *K_SHARED, *V_SHARED, *OUT)
    assert result.count("attention") == 0
    result.assert_same_result()


def test_heads_tiled_by_expand_are_refused():
    def tile(kv):
        return kv[:, None].expand(BATCH, 2, KV_HEADS, LENGTH, DIM).reshape(BATCH, HEADS, LENGTH, DIM)

    core = lambda q, k, v: scaled_dot_product_attention(q, tile(k), tile(v))  # noqa: E731
    result = rewritten(grouped(core), X, *Q, *K_SHARED, *V_SHARED, *OUT)
    assert result.count("attention") == 0
    result.assert_same_result()


def test_a_single_key_head():
    k, v = (tensor(5, WIDTH, seed=24), tensor(DIM, 5, seed=25)), (tensor(6, WIDTH, seed=26), tensor(DIM, 6, seed=27))

    def function(x, qd, qu, kd, ku, vd, vu, od, ou):
        q, k, v = heads_of(low_rank(x, qd, qu)), low_rank(x, kd, ku), low_rank(x, vd, vu)
        k, v = (y.view(BATCH, LENGTH, 1, DIM).transpose(1, 2).expand(-1, HEADS, -1, -1) for y in (k, v))
        return low_rank(merge(scaled_dot_product_attention(q, k, v)), od, ou)

    kwargs = assert_whole_region(rewritten(function, X, *Q, *k, *v, *OUT))
    assert kwargs.get("num_kv_heads", 1) == 1


# Packed projections

PACKED = (tensor(6, WIDTH, seed=30), tensor(3 * WIDTH, 6, seed=31), tensor(3 * WIDTH, seed=32))


def as_heads(parts):
    return [heads_of(part) for part in parts]


def unpack_neox(y):
    q, k, v = (y.view(BATCH, LENGTH, HEADS, 3 * DIM).transpose(1, 2).split(DIM, dim=-1)[i] for i in range(3))
    return q, k, v


def unpack_megatron(y):
    y = y.view(BATCH, LENGTH, HEADS, 3, DIM)
    return [y[:, :, :, i].transpose(1, 2) for i in range(3)]


def unpack_timm(y):
    parts = y.reshape(BATCH, LENGTH, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
    return parts.unbind(0)[0], parts.unbind(0)[1], parts.unbind(0)[2]


UNPACKINGS = {
    "split": lambda y: as_heads([y.split(WIDTH, dim=2)[i] for i in range(3)]),
    "chunk": lambda y: as_heads([y.chunk(3, dim=-1)[i] for i in range(3)]),
    "slices": lambda y: as_heads([y[..., :WIDTH], y[..., WIDTH : 2 * WIDTH], y[..., 2 * WIDTH :]]),
    "unbind of five dimensions": unpack_timm,
    "indexing of five dimensions": lambda y: [
        y.reshape(BATCH, LENGTH, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)[i] for i in range(3)
    ],
    "a third of each head": unpack_neox,
    "three to a head": unpack_megatron,
}


@pytest.mark.parametrize("spelling", UNPACKINGS)
def test_every_way_to_unpack_one_projection_into_three(spelling):
    def function(x, down, up, bias, od, ou):
        parts = UNPACKINGS[spelling](low_rank(x, down, up, bias))
        return low_rank(merge(sdpa(parts[0], parts[1], parts[2])), od, ou)

    assert_whole_region(rewritten(function, X, *PACKED, *OUT), {"q": 6, "k": 6, "v": 6, "out": 7})


def test_an_unequal_split_into_queries_keys_and_values():
    sizes = [WIDTH, KV_HEADS * DIM, KV_HEADS * DIM]
    down, up = tensor(6, WIDTH, seed=33), tensor(sum(sizes), 6, seed=34)

    def function(x, down, up, od, ou):
        parts = low_rank(x, down, up).split(sizes, dim=-1)
        q, k, v = heads_of(parts[0]), heads_of(parts[1], KV_HEADS), heads_of(parts[2], KV_HEADS)
        return low_rank(merge(scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v))), od, ou)

    kwargs = assert_whole_region(rewritten(function, X, down, up, *OUT), {"q": 6, "k": 6, "v": 6, "out": 7})
    assert kwargs["num_kv_heads"] == KV_HEADS


def in_each_head(y):
    return y.view(BATCH, LENGTH, HEADS, 3 * DIM)


def halves_of_two_thirds(y, size, dim):
    """Two of three parts first, then each of them."""
    first, last = y.split([2 * size, size], dim)
    return *(first.chunk(2, dim)[i] for i in range(2)), last


def split_behind_the_first(y):
    rest = y[..., DIM:].split(DIM, dim=-1)
    return y[..., :DIM], rest[0], rest[1]


def unbound_of_two_thirds(y):
    first = y.unflatten(-1, (3, DIM))[..., :2, :].unbind(3)
    return first[0], first[1], y[..., 2 * DIM :]


PARTS_OF_PARTS = {
    "in each head": lambda y: halves_of_two_thirds(in_each_head(y), DIM, 3),
    "of heads": lambda y: halves_of_two_thirds(y.view(BATCH, LENGTH, 3 * HEADS, DIM), HEADS, 2),
    "of the projection": lambda y: [z.unflatten(-1, (HEADS, DIM)) for z in halves_of_two_thirds(y, WIDTH, 2)],
    "the rest, then split": lambda y: split_behind_the_first(in_each_head(y)),
    "some of five dimensions": lambda y: unbound_of_two_thirds(in_each_head(y)),
    "slices of slices": lambda y: (
        in_each_head(y)[..., 1:][..., :DIM],
        in_each_head(y)[..., 3 : 3 + DIM],
        in_each_head(y)[..., 2:-1][..., -DIM:],
    ),
}


@pytest.mark.parametrize("spelling", PARTS_OF_PARTS)
def test_parts_of_parts_of_one_projection(spelling):
    def function(x, down, up, bias, od, ou):
        parts = PARTS_OF_PARTS[spelling](low_rank(x, down, up, bias))
        return low_rank(merge(sdpa(*(part.transpose(1, 2) for part in parts))), od, ou)

    assert_whole_region(rewritten(function, X, *PACKED, *OUT), {"q": 6, "k": 6, "v": 6, "out": 7})


def test_keys_and_values_packed_behind_the_queries_of_all_heads():
    """Falcon with one key head, taken by lists of one index."""
    down, up = tensor(6, WIDTH, seed=35), tensor((HEADS + 2) * DIM, 6, seed=36)

    def function(x, down, up, od, ou):
        packed = low_rank(x, down, up).view(BATCH, LENGTH, HEADS + 2, DIM)
        q, k, v = packed[..., :-2, :], packed[..., [-2], :], packed[..., [-1], :]
        return low_rank(merge(sdpa(*(y.transpose(1, 2) for y in (q, k, v)))), od, ou)

    kwargs = assert_whole_region(rewritten(function, X, down, up, *OUT), {"q": 6, "k": 6, "v": 6, "out": 7})
    assert kwargs.get("num_kv_heads", 1) == 1


def test_keys_and_values_packed_behind_the_queries_of_each_group():
    """Falcon with several key heads."""
    group = HEADS // KV_HEADS
    down, up = tensor(6, WIDTH, seed=37), tensor(KV_HEADS * (group + 2) * DIM, 6, seed=38)

    def function(x, down, up, od, ou):
        packed = low_rank(x, down, up).view(BATCH, LENGTH, KV_HEADS, group + 2, DIM)
        q = packed[:, :, :, :-2]
        k, v = (torch.broadcast_to(packed[:, :, :, [i]], (BATCH, LENGTH, KV_HEADS, group, DIM)) for i in (-2, -1))
        return low_rank(merge(sdpa(*(y.flatten(2, 3).transpose(1, 2) for y in (q, k, v)))), od, ou)

    kwargs = assert_whole_region(rewritten(function, X, down, up, *OUT), {"q": 6, "k": 6, "v": 6, "out": 7})
    assert kwargs["num_kv_heads"] == KV_HEADS


def test_a_list_of_several_indices_is_no_view():
    def function(x, qd, qu, kd, ku, vd, vu):
        q, k, v = (heads_of(low_rank(x, *pair))[:, [2, 0]] for pair in ((qd, qu), (kd, ku), (vd, vu)))
        return sdpa(q, k, v).transpose(1, 2).flatten(2)

    result = rewritten(function, X, *Q, *K, *V)
    assert result.count("attention") == 0
    result.assert_same_result()


# Members

DENSE = tensor(WIDTH, WIDTH, seed=40)


def test_a_dense_member_is_a_projection_of_full_rank():
    def function(x, w, kd, ku, vd, vu, od, ou):
        q, k, v = heads_of(linear(x, w)), heads_of(low_rank(x, kd, ku)), heads_of(low_rank(x, vd, vu))
        return low_rank(merge(sdpa(q, k, v)), od, ou)

    assert_whole_region(rewritten(function, X, DENSE, *K, *V, *OUT), RANKS | {"q": "full"})


def test_only_the_output_projection_low_rank():
    def function(x, w, od, ou):
        q = heads_of(linear(x, w))
        return low_rank(merge(sdpa(q, heads_of(linear(x, w)), heads_of(linear(x, w)))), od, ou)

    result = rewritten(function, X, DENSE, *OUT)
    assert_whole_region(result, {"q": "full", "k": "full", "v": "full", "out": 7})


BETWEEN_FACTORS = {
    "a diagonal": lambda y, s: y * s,
    "a diagonal in front": lambda y, s: s * y,
    "a number": lambda y, s: y * 0.5,
    "a bias and a diagonal": lambda y, s: (y + s) * s,
}


@pytest.mark.parametrize("between", BETWEEN_FACTORS)
@pytest.mark.parametrize("others", ["dense", "low-rank"])
def test_a_diagonal_between_the_factors_of_the_output_projection(between, others):
    def function(x, w, s, qd, qu, kd, ku, vd, vu, od, ou):
        pairs = ((qd, qu), (kd, ku), (vd, vu))
        q, k, v = (heads_of(linear(x, w) if others == "dense" else low_rank(x, *pair)) for pair in pairs)
        return linear(BETWEEN_FACTORS[between](linear(merge(sdpa(q, k, v)), od), s), ou)

    ranks = RANKS if others == "low-rank" else dict.fromkeys("qkv", "full") | {"out": 7}
    assert_whole_region(rewritten(function, X, DENSE, tensor(RANKS["out"], seed=60), *ALL), ranks)


OF_THE_RESULT = {
    "a pair": (low_rank, WIDTH, RANKS["out"]),
    "a lone factor": (lambda y, od, ou: linear(y, od), RANKS["out"], "full"),
}


@pytest.mark.parametrize("out", OF_THE_RESULT)
def test_a_diagonal_that_no_second_factor_follows_stays_behind_the_region(out):
    project, features, rank = OF_THE_RESULT[out]

    def function(x, s, qd, qu, kd, ku, vd, vu, od, ou):
        q, k, v = (heads_of(low_rank(x, d, u)) for d, u in ((qd, qu), (kd, ku), (vd, vu)))
        return project(merge(sdpa(q, k, v)), od, ou) * s

    result = rewritten(function, X, tensor(features, seed=60), *ALL)
    assert_whole_region(result, RANKS | {"out": rank})
    assert len(result.module.graph.find_nodes(op="call_function", target=operator.mul)) == 1


def test_a_dense_attention_is_left_to_the_inner_backend():
    def function(x, w):
        q, k, v = (heads_of(linear(x, w)) for _ in range(3))
        return linear(merge(sdpa(q, k, v)), w)

    result = rewritten(function, X, DENSE)
    assert result.report.matches == []
    assert result.report.refusals == []


def test_cross_attention():
    def function(x, context, qd, qu, kd, ku, vd, vu, od, ou):
        q, k, v = (heads_of(low_rank(t, d, u)) for t, d, u in ((x, qd, qu), (context, kd, ku), (context, vd, vu)))
        return low_rank(merge(sdpa(q, k, v)), od, ou)

    kwargs = assert_whole_region(rewritten(function, X, tensor(BATCH, 9, WIDTH, seed=50), *ALL))
    assert "context" in kwargs


def test_keys_and_values_of_different_tensors_are_refused():
    def function(x, y, qd, qu, kd, ku, vd, vu, od, ou):
        q, k, v = (heads_of(low_rank(t, d, u)) for t, d, u in ((x, qd, qu), (x + y, kd, ku), (x, vd, vu)))
        return low_rank(merge(sdpa(q, k, v)), od, ou)

    result = rewritten(function, X, tensor(BATCH, LENGTH, WIDTH, seed=51), *ALL)
    assert result.count("attention") == 0
    assert result.count("linear") == 4
    assert result.reasons == [RefusalReason.UNSUPPORTED_ATTENTION]
    result.assert_same_result()


def test_heads_with_another_user_stay_out_of_the_output_projection():
    def function(x, a, b, c, d, e, f, g, h):
        heads = merge(sdpa(heads_of(low_rank(x, a, b)), heads_of(low_rank(x, c, d)), heads_of(low_rank(x, e, f))))
        return low_rank(heads, g, h), heads

    result = rewritten(function, X, *ALL)
    assert result.count("attention") == 1
    assert result.count("linear") == 1
    assert result.report.matches[0].ranks == {"q": 3, "k": 5, "v": 6}
    result.assert_same_result()


def stays(x):
    return x


def joined_with_nothing(x):
    """As transformers' cache takes its first keys."""
    return torch.cat([torch.tensor([], dtype=x.dtype), x], dim=-2)


def joined_with_no_rows(x):
    return torch.cat([x, x[:, :, :0]], dim=2)


@pytest.mark.parametrize("kept", [stays, joined_with_nothing, joined_with_no_rows])
def test_keys_and_values_that_fill_a_cache_are_computed_for_it_and_for_the_region(kept):
    def function(x, a, b, c, d, e, f, g, h):
        k, v = kept(heads_of(low_rank(x, c, d))), kept(heads_of(low_rank(x, e, f)))
        return low_rank(merge(sdpa(heads_of(low_rank(x, a, b)), k, v)), g, h), k, v

    result = rewritten(function, X, *ALL)
    assert result.count("attention") == 1
    assert result.count("linear") == 2
    (match,) = (match for match in result.report.matches if match.kind == "attention")
    assert match.ranks == RANKS
    assert "k, v are computed again for what else reads them" in match.reason
    result.assert_same_result()


def test_a_join_of_what_is_no_list_in_the_graph_is_not_read():
    def function(x, a, b, c, d, e, f, g, h):
        q, k, v = heads_of(low_rank(x, a, b)), heads_of(low_rank(x, c, d)), heads_of(low_rank(x, e, f))
        return low_rank(merge(sdpa(q, torch.cat(k.chunk(2, dim=2), dim=2), v)), g, h)

    result = rewritten(function, X, *ALL)
    assert result.count("attention") == 0
    result.assert_same_result()


def test_keys_packed_with_queries_and_values_that_fill_a_cache():
    """What is packed stays as a whole, and the plan counts it as computed twice."""

    def function(x, down, up):
        packed = low_rank(x, down, up)
        q, k, v = (heads_of(packed[..., first : first + WIDTH]) for first in (0, WIDTH, 2 * WIDTH))
        return merge(sdpa(q, k, v)), k

    result = rewritten(function, X, tensor(5, WIDTH, seed=53), tensor(3 * WIDTH, 5, seed=54))
    assert result.count("attention") == result.count("linear") == 1
    (match,) = (match for match in result.report.matches if match.kind == "attention")
    assert "q, k, v are computed again for what else reads them" in match.reason
    result.assert_same_result()


def test_a_cache_that_holds_something_already_is_read_as_it_is():
    def function(x, past, a, b, c, d, e, f, g, h):
        k, v = (torch.cat([past, heads_of(low_rank(x, *factors))], dim=2) for factors in ((c, d), (e, f)))
        return low_rank(merge(sdpa(heads_of(low_rank(x, a, b)), k, v)), g, h), k, v

    result = rewritten(function, X, tensor(BATCH, HEADS, 3, WIDTH // HEADS, seed=52), *ALL)
    assert result.count("attention") == 0
    assert result.reasons == [RefusalReason.UNSUPPORTED_ATTENTION]
    result.assert_same_result()


def test_a_gate_that_comes_with_the_queries_stays():
    """As of Qwen3-Next: the projection is computed for the gate, and its rows for the queries by the region."""

    def function(x, a, b, c, d, e, f, g, h):
        q, gate = low_rank(x, a, b).unflatten(-1, (HEADS, -1)).chunk(2, dim=-1)
        k, v = heads_of(low_rank(x, c, d)), heads_of(low_rank(x, e, f))
        heads = merge(sdpa(q.transpose(1, 2), k, v)) * gate.reshape(BATCH, LENGTH, WIDTH).sigmoid()
        return low_rank(heads, g, h)

    down, up = tensor(5, WIDTH, seed=55), tensor(2 * WIDTH, 5, seed=56)
    result = rewritten(function, X, down, up, *ALL[2:])
    assert result.count("attention") == 1
    assert result.count("linear") == 2
    (match,) = (match for match in result.report.matches if match.kind == "attention")
    assert match.ranks == {"q": 5, "k": RANKS["k"], "v": RANKS["v"]}
    assert "q are computed again for what else reads them" in match.reason
    result.assert_same_result()


def test_scores_that_are_wanted_leave_a_region_as_it_is():
    def function(x, a, b, c, d, e, f, g, h):
        q, k, v = heads_of(low_rank(x, a, b)), heads_of(low_rank(x, c, d)), heads_of(low_rank(x, e, f))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return low_rank(merge(scores.softmax(-1) @ v), g, h), scores

    result = rewritten(function, X, *ALL)
    assert result.count("attention") == 0
    assert RefusalReason.OTHER_USER in result.reasons
    result.assert_same_result()


def test_a_cache_that_is_overwritten_before_it_is_read_leaves_the_region_as_it_is():
    def function(x, a, b, c, d, e, f, g, h):
        q, k, v = heads_of(low_rank(x, a, b)), heads_of(low_rank(x, c, d)), heads_of(low_rank(x, e, f)).contiguous()
        k = k.contiguous()
        other = k.view(-1)
        other.mul_(2.0)
        return low_rank(merge(sdpa(q, k, v)), g, h), other, v

    result = rewritten(function, X, *ALL)
    assert result.count("attention") == 0
    result.assert_same_result()


def test_a_live_dropout_behind_the_output_projection_stays_where_it_is():
    def function(x, a, b, c, d, e, f, g, h):
        return functional.dropout(attention()(x, a, b, c, d, e, f, g, h), 0.1) + x

    result = rewritten(function, X, *ALL)
    assert result.count("attention") == 1
    assert result.report.matches[0].ranks == RANKS
    assert "dropout" in result.code


@pytest.mark.parametrize("shape", [(1, 6), (2, 1), (1, 1)])
def test_sizes_of_one(shape):
    batch, length = shape

    def function(x, a, b, c, d, e, f, g, h):
        q, k, v = (
            low_rank(x, s, t).view(batch, length, HEADS, DIM).transpose(1, 2) for s, t in ((a, b), (c, d), (e, f))
        )
        return low_rank(sdpa(q, k, v).transpose(1, 2).reshape(batch, length, WIDTH), g, h)

    assert_whole_region(rewritten(function, tensor(batch, length, WIDTH), *ALL))


def test_a_single_head():
    def function(x, a, b, c, d, e, f, g, h):
        q, k, v = (low_rank(x, s, t).unsqueeze(1) for s, t in ((a, b), (c, d), (e, f)))
        return low_rank(sdpa(q, k, v).squeeze(1), g, h)

    kwargs = assert_whole_region(rewritten(function, X, *ALL))
    assert kwargs.get("num_heads", 1) == 1


def test_rows_flattened_around_every_projection():
    def function(x, qkv_down, qkv_up, bias, od, ou):
        rows = x.view(-1, WIDTH)
        packed = torch.addmm(bias, torch.mm(rows, qkv_down.t()), qkv_up.t()).view(BATCH, LENGTH, 3 * WIDTH)
        q, k, v = (heads_of(packed.split(WIDTH, dim=2)[i]) for i in range(3))
        merged = merge(sdpa(q, k, v)).view(-1, WIDTH)
        return (merged @ od.t() @ ou.t()).view(BATCH, LENGTH, WIDTH)

    assert_whole_region(rewritten(function, X, *PACKED, *OUT), {"q": 6, "k": 6, "v": 6, "out": 7})


@pytest.mark.parametrize(
    ("core", "masked", "causal"),
    [
        (sdpa, False, False),
        (lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), False, True),
        (lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=see_earlier()), True, True),
        (lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=see_all()), True, False),
    ],
    ids=["no mask", "causal flag", "causal mask", "a mask that hides nothing"],
)
def test_a_plan_is_told_what_the_model_as_written_pays_for(core, masked, causal, monkeypatch):
    """A library's attention passes over all keys wherever it is given a mask, even one that hides none."""
    shapes = []
    monkeypatch.setattr(
        attention_rule, "plan_attention", lambda shape, options: shapes.append(shape) or plan_attention(shape, options)
    )
    result = rewritten(attention(core=core), X, *ALL)
    result.assert_same_result()
    assert [(shape.masked, shape.causal) for shape in shapes] == [(masked, causal)]


def see_all():
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool)


def see_earlier():
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


@pytest.mark.parametrize("shape", [(1, BATCH * LENGTH, WIDTH), (LENGTH, BATCH, WIDTH), (3, 4, WIDTH)], ids=str)
def test_other_rows_of_the_result_are_not_lost(shape):
    def function(x, qd, qu, kd, ku, vd, vu, od, ou):
        return attention()(x, qd, qu, kd, ku, vd, vu, od, ou).view(shape) + torch.ones(shape[1], 1)

    result = rewritten(function, X, *ALL)
    assert result.count("attention") == 1, result.report
    result.assert_same_result()


def of_each_head(heads, rank, seed):
    return tensor(heads, WIDTH, rank, seed=seed), tensor(heads, rank, DIM, seed=seed + 1)


def attention_of_each_head(rows):
    """Of ``x``, whose dimensions are ``rows``, by factors of each head."""

    def function(x, *factors):
        pairs = zip(factors[::2], factors[1::2], strict=True)
        heads = (torch.einsum("bhmr,hrd->bhmd", torch.einsum(f"{rows},hdr->bhmr", x, down), up) for down, up in pairs)
        return sdpa(*heads).transpose(1, 2).flatten(2)

    return lambda x, a, b, c, d, e, f: function(x, a, b, c, d, e, f)


FACTORS = [factor for seed in (70, 72, 74) for factor in of_each_head(HEADS, 3, seed)]


def test_factors_of_each_head():
    assert_whole_region(rewritten(attention_of_each_head("bmd"), X, *FACTORS), {"q": 3, "k": 3, "v": 3})


@pytest.mark.parametrize(("rows", "shape"), [("mbd", (6, 2, WIDTH)), ("mbd", (4, 4, WIDTH)), ("bdm", (2, WIDTH, 6))])
def test_factors_of_each_head_of_rows_in_another_order(rows, shape):
    result = rewritten(attention_of_each_head(rows), tensor(*shape), *FACTORS)
    assert result.count("attention") == 0
    result.assert_same_result()


@pytest.mark.parametrize("shared", [0, 1], ids=["down", "up"])
def test_one_factor_for_all_heads_that_is_repeated(shared):
    """By einsum, whose letters may stand for sizes of 1."""
    factors = [factor[:1] if i % 2 == shared else factor for i, factor in enumerate(FACTORS)]
    result = rewritten(attention_of_each_head("bmd"), X, *factors)
    assert result.count("attention") == 0
    result.assert_same_result()


REPEATED = {
    "each head": lambda y: y.repeat_interleave(2, dim=1),
    "the first head": lambda y: y[:, :1].expand(-1, HEADS, -1, -1),
}


FACTORS_OF_KV_HEADS = [weight[: KV_HEADS * DIM] if i % 2 else weight for i, weight in enumerate(ALL[:6])]


def attention_of_repeated(repeated):
    def function(x, qd, qu, kd, ku, vd, vu):
        pairs = (qd, qu), (kd, ku), (vd, vu)
        return merge(sdpa(*(repeated(heads_of(low_rank(x, *pair), KV_HEADS)) for pair in pairs)))

    return function


@pytest.mark.parametrize("repeated", REPEATED)
def test_queries_repeated_like_keys_and_values(repeated):
    result = rewritten(attention_of_repeated(REPEATED[repeated]), X, *FACTORS_OF_KV_HEADS)
    assert result.count("attention") == 0
    assert RefusalReason.UNSUPPORTED_ATTENTION in result.reasons
    result.assert_same_result()


def test_a_region_that_was_misread_stays(monkeypatch):
    """What the rule should have seen: with one key head in place of as many, the result has other sizes."""
    monkeypatch.setattr(attention_rule, "_mismatch", lambda *_: None)

    result = rewritten(attention_of_repeated(REPEATED["each head"]), X, *FACTORS_OF_KV_HEADS)
    assert result.count("attention") == 0 and result.count("linear") == 3
    assert RefusalReason.MISREAD in result.reasons
    result.assert_same_result()


def test_probabilities_read_with_items_for_heads():
    """As many items as heads, so that both are possible."""

    def core(q, k, v):
        probabilities = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k), dim=-1)
        return torch.einsum("hbqk,bkhd->bqhd", probabilities, v)

    def function(x, qd, qu, kd, ku, vd, vu):
        q, k, v = (low_rank(x, *pair).unflatten(-1, (HEADS, DIM)) for pair in ((qd, qu), (kd, ku), (vd, vu)))
        return core(q, k, v).flatten(2)

    result = rewritten(function, tensor(HEADS, LENGTH, WIDTH), *ALL[:6])
    assert result.count("attention") == 0
    result.assert_same_result()


def test_a_bias_of_each_head_that_adds_a_dimension():
    def function(x, qd, qu, kd, ku, vd, vu, bias):
        q, k, v = (x.unsqueeze(1) @ down @ up for down, up in ((qd, qu), (kd, ku), (vd, vu)))
        return sdpa((q + bias).squeeze(0), k, v).transpose(1, 2).flatten(2)

    result = rewritten(function, X, *FACTORS, tensor(1, 1, HEADS, 1, DIM))
    assert result.count("attention") == 0
    result.assert_same_result()


def test_sizes_that_nothing_reads_are_no_readers():
    """Dynamo leaves them in the bodies of checkpoints."""

    def core(q, k, v):
        heads = sdpa(q, k, v)
        _ = heads.size()[1], heads.shape[2], heads.size(3)
        return heads

    assert_whole_region(rewritten(attention(core=core), X, *ALL))
