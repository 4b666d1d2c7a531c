"""Attention in Gluon on a Hopper GPU: every query's result written, nothing else, and right by the error rule."""

import pytest
import torch

from flashsvd_compile.kernels import attention
from flashsvd_compile.kernels.attention_hopper import attention_hopper
from tests.ops.accuracy import assert_within_error_rule
from tests.ops.regions import LAYOUTS, laid_out, padding, random

from .hopper import NEEDS_HOPPER, one_launch

pytestmark = NEEDS_HOPPER

HEADS = [(64, False), (128, False), (128, True)]
"""Head sizes, and whether causal."""


def hidden_keys(q_len, kv_len, causal, key_padding):
    hidden = torch.zeros(q_len, kv_len, dtype=torch.bool, device="cuda")
    if causal:
        hidden = (~hidden).triu(1)
    return hidden if key_padding is None else hidden | ~key_padding[:, None, None]


def reference(q, k, v, scale, causal, key_padding=None):
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    hidden = hidden_keys(q.shape[2], k.shape[2], causal, key_padding)
    weights = (q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
    return (weights @ v).transpose(1, 2)


def operands(q_len, kv_len, dim, *, items=2, heads=4, kv_heads=4, dtype=torch.bfloat16):
    shapes = (items, q_len, heads, dim), (items, kv_len, kv_heads, dim), (items, kv_len, kv_heads, dim)
    return [random(*shape, dtype=dtype).cuda() for shape in shapes]


def how(dim, key_padding=None):
    bounds = None if key_padding is None else attention.key_bounds(key_padding)
    return {"scale": dim**-0.5, "key_padding": key_padding, "bounds": bounds}


def assert_right(causal, q, k, v, key_padding=None):
    """Attend into the first items of a tensor of NaN, of which the rest must stay."""
    items, *shape = q.shape
    poisoned = torch.full((items + 1 + 192 // shape[0], *shape), torch.nan, dtype=q.dtype, device="cuda")
    out = poisoned[:items]
    attention_hopper(q, k, v, out, causal=causal, **how(q.shape[-1], key_padding))
    assert_within_error_rule(out, reference, (q, k, v, q.shape[-1] ** -0.5, causal, key_padding))
    assert poisoned[items:].isnan().all()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 192, 193, 200, 385, 512, 1000])
@pytest.mark.parametrize(("dim", "causal"), HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lengths(dtype, dim, causal, length):
    assert_right(causal, *operands(length, length, dim, dtype=dtype))


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 300), (300, 1), (130, 700), (700, 130), (128, 129), (257, 256)])
@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_other_keys_than_queries(dim, causal, q_len, kv_len):
    assert_right(causal, *operands(q_len, kv_len, dim))


@pytest.mark.parametrize(("items", "heads", "kv_heads"), [(1, 1, 1), (3, 6, 2), (1, 8, 1), (5, 3, 3)])
@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_grouped_heads(dim, causal, items, heads, kv_heads):
    assert_right(causal, *operands(200, 200, dim, items=items, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize(("dim", "causal"), HEADS)
@pytest.mark.parametrize("kv_heads", [12, 4])
def test_many_tiles_a_program(dim, causal, kv_heads):
    """More keys and values than stay in the cache at once."""
    assert_right(causal, *operands(1000, 1000, dim, items=24, heads=12, kv_heads=kv_heads))


PADDINGS = {
    "right": lambda keys: padding(keys, 0, keys // 2, 1, total=keys),
    "left": lambda keys: padding(keys, 0, keys // 2, 1, total=keys, left=True),
    "both sides": lambda keys: (
        padding(keys - 7, keys // 2 + 3, 130, keys - 1, total=keys)
        & padding(keys - 9, keys // 2 + 3, keys - 128, keys - 256, total=keys, left=True)
    ),
    "holes": lambda keys: torch.rand(4, keys) < torch.tensor([0.005, 0.5, 0.99, 1.0])[:, None],
    "a block": lambda keys: torch.arange(keys) // 128 != torch.tensor([0, 1, 2, (keys - 1) // 128])[:, None],
    "all but the ends": lambda keys: padding(1, 1, 3, 129, total=keys) | padding(1, 9, 0, 128, total=keys, left=True),
}
"""Of four items, by the number of keys; true where visible."""


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("length", [1, 128, 777, 2049])
@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_padding(dim, causal, length, kind):
    assert_right(causal, *operands(length, length, dim, items=4), key_padding=PADDINGS[kind](length).cuda())


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_padding_in_half_precision(dim, causal, kind):
    assert_right(causal, *operands(777, 777, dim, items=4, dtype=torch.float16), key_padding=PADDINGS[kind](777).cuda())


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 300), (300, 1), (130, 700), (700, 130)])
@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_padding_of_other_keys_than_queries(dim, causal, q_len, kv_len, kind):
    assert_right(causal, *operands(q_len, kv_len, dim, items=4), key_padding=PADDINGS[kind](kv_len).cuda())


@pytest.mark.parametrize("kv_heads", [12, 3])
@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_padding_of_many_tiles_a_program(dim, causal, kv_heads):
    """Of different numbers of blocks; some see no key."""
    ends = [padding(*torch.randint(300, 1001, (24,)).tolist(), total=1000, left=left) for left in (False, True)]
    tensors = operands(1000, 1000, dim, items=24, heads=12, kv_heads=kv_heads)
    assert_right(causal, *tensors, key_padding=(ends[0] & ends[1]).cuda())


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded along keys"])
@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_layouts_of_padding(dim, causal, layout):
    key_padding = PADDINGS["holes"](200).cuda()
    if layout == "expanded along keys":
        key_padding = key_padding[:, :1].expand_as(key_padding)
    assert_right(causal, *operands(200, 200, dim, items=4), key_padding=laid_out(key_padding, layout))


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_a_query_that_sees_no_key_gives_zeros(dim, kind, causal):
    q, k, v = operands(600, 600, dim, items=4)
    key_padding = PADDINGS[kind](600).cuda()
    out = torch.full_like(q, torch.nan)
    attention_hopper(q, k, v, out, causal=causal, **how(dim, key_padding))
    sees_none = hidden_keys(600, 600, causal, key_padding).all(-1).squeeze(1)
    assert torch.equal((out == 0).flatten(2).all(-1), sees_none)


@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_keys_that_padding_hides_are_not_looked_at(dim, causal):
    """Nor their values, but in blocks of which a key is visible: there a weight of 0 multiplies them."""
    length = 1024
    key_padding = padding(700, 0, 129, length, total=length) & padding(700, 5, length, 300, total=length, left=True)
    key_padding = key_padding.cuda()
    read = key_padding.unflatten(1, (-1, 128)).any(-1).repeat_interleave(128, dim=1)
    q, k, v = operands(length, length, dim, items=4)
    some_keys = k.masked_fill(~key_padding[..., None, None], torch.nan)
    some_values = v.masked_fill(~read[..., None, None], torch.nan)
    out = torch.full_like(q, torch.nan)
    attention_hopper(q, some_keys, some_values, out, causal=causal, **how(dim, key_padding))
    assert_within_error_rule(out, reference, (q, k, v, dim**-0.5, causal, key_padding))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [65, 200, 1000])
@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_in_place(dim, causal, length, padded):
    q, k, v = operands(length, length, dim, items=3, heads=8)
    key_padding = padding(length, length // 2, 0, total=length).cuda() if padded else None
    arguments = q.clone(), k, v, dim**-0.5, causal, key_padding
    attention_hopper(q, k, v, q, causal=causal, **how(dim, key_padding))
    assert_within_error_rule(q, reference, arguments)


@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_columns_of_one_matrix(dim, causal):
    """Queries, keys and values side by side; what lies behind the last item is not looked at."""
    items, length, heads, kv_heads = 2, 200, 4, 2
    matrix = random(items + 1, length, heads + 2 * kv_heads, dim, dtype=torch.bfloat16).cuda()
    matrix[items:] = torch.nan
    assert_right(causal, *matrix[:items].split([heads, kv_heads, kv_heads], dim=2))


@pytest.mark.parametrize("specialised", [False, True])
@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_what_is_no_number_stays_in_its_item(dim, causal, specialised):
    """Also behind the last of keys that fill no block, which are hidden by weights of 0."""
    q, k, v = operands(200, 200, dim, items=3)
    for tensor in (q, k, v):
        tensor[1] = torch.nan
    out = torch.zeros_like(q)
    if specialised:
        attention_hopper(q, k, v, out, scale=dim**-0.5, causal=causal)
    else:
        attention.attention(q, k, v, out, window_left=-1, window_right=0 if causal else -1, **how(dim))
    assert not out[::2].isnan().any()
    assert out[1].isnan().all()


@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_large_scores(dim, causal):
    q, k, v = operands(300, 300, dim)
    assert_right(causal, 10 * q, 10 * k, v)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_nothing_spills(dim, causal, padded):
    q, k, v = operands(256, 256, dim)
    options = how(dim, padding(256, 128, total=256).cuda() if padded else None)
    with one_launch() as launches:
        attention_hopper(q, k, v, torch.empty_like(q), causal=causal, **options)
    assert launches[0].compiled.n_spills == 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("window", "sizes"), [((-1, -1), [64, 128]), ((-1, 0), [128]), ((64, 0), [])])
@pytest.mark.parametrize("keys", [attention.SPECIALISED_KEYS - 1, attention.SPECIALISED_KEYS])
@pytest.mark.parametrize("dim", [64, 128])
def test_taken_where_it_is_faster(dim, keys, window, sizes, padded):
    q, k, v = operands(2048, keys, dim, items=1, heads=12, kv_heads=12)
    options = how(dim, padding(128, total=keys).cuda() if padded else None)
    with one_launch() as launches:
        attention.attention(q, k, v, torch.empty_like(q), window_left=window[0], window_right=window[1], **options)
    taken = dim in sizes and keys == attention.SPECIALISED_KEYS
    assert (launches[0].kernel.__name__ == "attention_hopper_kernel") == taken


@pytest.mark.parametrize(("q_len", "heads", "taken"), [(2048, 12, True), (2048, 16, False), (300, 12, False)])
def test_tiles_of_narrow_heads_come_out_even(q_len, heads, taken):
    q, k, v = operands(q_len, 2048, 64, items=1, heads=heads, kv_heads=heads)
    with one_launch() as launches:
        attention.attention(q, k, v, torch.empty_like(q), window_left=-1, window_right=-1, **how(64))
    assert (launches[0].kernel.__name__ == "attention_hopper_kernel") == taken


def test_causality_of_narrow_heads_is_refused():
    """Their tiles do not end with blocks of keys."""
    q, k, v = operands(200, 200, 64)
    with pytest.raises(ValueError, match="heads of 64"):
        attention_hopper(q, k, v, torch.empty_like(q), causal=True, **how(64))


@pytest.mark.parametrize(("dim", "causal"), HEADS)
def test_padding_is_passed_on_to_it(dim, causal):
    q, k, v = operands(2048, 2048, dim, heads=6, kv_heads=6)
    key_padding = PADDINGS["both sides"](2048)[:2].cuda()
    options = how(dim, key_padding)
    out = torch.full_like(q, torch.nan)
    with one_launch() as launches:
        attention.attention(q, k, v, out, window_left=-1, window_right=0 if causal else -1, **options)
    assert launches[0].kernel.__name__ == "attention_hopper_kernel"
    assert_within_error_rule(out, reference, (q, k, v, dim**-0.5, causal, key_padding))
