"""``attention_v5`` computes the specification, whatever the heads, ranks, masks, rotation, strides and workspace."""

import sys
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashsvd_compile import ops
from flashsvd_compile.ops import projection as proj
from flashsvd_compile.ops import sdpa
from flashsvd_compile.ops.attention import reference
from flashsvd_compile.ops.projection import Projection

from .accuracy import assert_within_error_rule, in_float64, relative_error
from .regions import LAYOUTS, NO_NORM, attention_arguments, norm, packed, padding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = st.none() | st.integers(1, 19)
SCALE = [argument.name for argument in ops.attention._schema.arguments].index("scale")
PARTS = slice(0, 40), slice(40, 90)


def check(arguments: tuple, **how) -> Tensor:
    """The operator keeps the error rule, as a whole or in chunks."""
    for workspace_bytes in {max(1, arguments[0].nbytes // 4), arguments[-1]}:
        result = ops.attention(*arguments[:-1], workspace_bytes)
        assert_within_error_rule(result, reference, arguments, **how)
    return result


@st.composite
def regions(draw) -> tuple:
    """Arguments of the operator out of everything it offers."""
    torch.manual_seed(draw(st.integers(0, 99)))
    batch, q_len = draw(st.integers(0, 4)), draw(st.integers(0, 9))
    rotary = draw(st.sampled_from((0, 2, 4, 8)))
    kv_len = None if rotary else draw(st.none() | st.integers(0, 9))
    keys = q_len if kv_len is None else kv_len
    kv_heads, group = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2, 3)))
    head_dim = draw(st.sampled_from((8, 10, 12)))
    dtype, features = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 33))
    key_padding = draw(st.none() | st.just(torch.rand(batch, keys) < 0.6))
    documents = draw(st.none() | st.just(torch.randint(3, (batch, q_len)))) if keys == q_len else None
    q_norm, k_norm = draw(norms(kv_heads * group, head_dim, dtype)), draw(norms(kv_heads, head_dim, dtype))
    layout = draw(st.sampled_from(LAYOUTS))
    if layout == "expanded" and "layer" in (q_norm[0], k_norm[0]):
        layout = "strided"  # all features of a head would be equal, and what is left of them nothing but rounding
    return attention_arguments(
        batch,
        q_len,
        kv_len,
        features,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=draw(st.none() | st.integers(1, 12)),
        ranks=draw(st.tuples(RANKS, RANKS, RANKS, RANKS)),
        out=draw(st.booleans()),
        out_features=draw(st.none() | st.integers(1, 30)),
        bias=draw(st.booleans()),
        down_bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        x_norm=draw(norms(1, features, dtype)) if kv_len is None else NO_NORM,
        key_padding=key_padding,
        mask=draw(masks(batch, kv_heads * group, q_len, keys, dtype)),
        rotary_dim=rotary,
        rotation_per_item=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        q_norm=q_norm,
        k_norm=k_norm,
        softcap=draw(st.sampled_from((0.0, 0.5, 30.0))),
        window=draw(st.tuples(st.integers(-1, 9), st.integers(-1, 9))),
        documents=documents,
        dtype=dtype,
        layout=layout,
        strategy=draw(st.sampled_from(("streamed", "merged"))),
        workspace_bytes=draw(st.integers(1, 6000)),
    )


def masks(batch: int, heads: int, q_len: int, kv_len: int, dtype: torch.dtype) -> st.SearchStrategy:
    """No mask, or a boolean or additive one of any shape that broadcasts."""
    full = (batch, heads, q_len, kv_len)
    shapes = st.tuples(*(st.sampled_from((1, n)) for n in full), st.sampled_from((0, 2)))
    shapes = shapes.map(lambda s: s[s[4] : 4])
    kept = shapes.map(lambda shape: torch.rand(shape) < 0.7)
    bias = shapes.map(lambda shape: torch.randn(shape).to(dtype))
    return st.none() | kept | bias


def norms(heads: int, head_dim: int, dtype: torch.dtype) -> st.SearchStrategy:
    """No norm, or one of either kind, per head or over all, with a weight and bias of any shape and dtype."""
    shapes = st.sampled_from(((head_dim,), (heads, head_dim), (heads * head_dim,)))
    how = {name: st.booleans() for name in ("weight", "bias", "whole")}
    how |= {"eps": st.sampled_from((1e-6, 0.1)), "dtype": st.sampled_from((dtype, torch.float32))}
    return st.just(NO_NORM) | st.builds(
        lambda kind, shape, how: norm(kind, *shape, **how),
        st.sampled_from(("rms", "layer")),
        shapes,
        st.fixed_dictionaries(how),
    )


@given(regions())
def test_equals_reference(arguments):
    check(arguments, ulps=8)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_sizes_and_groups(head_dim, num_kv_heads, dtype):
    check(
        attention_arguments(
            2, 33, features=128, head_dim=head_dim, num_kv_heads=num_kv_heads, ranks=(31, 17, None, 40), dtype=dtype,
            window=(-1, 0), rotary_dim=head_dim // 2, workspace_bytes=40_000,
        )
    )  # fmt: skip


@pytest.mark.parametrize("workspace_bytes", [1, 500, 1000, 1500, 2000, 3000, 5000, 9000, 20_000])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_every_chunk_boundary(workspace_bytes, num_kv_heads):
    key_padding = padding(7, 4, 6, total=7)
    check(attention_arguments(3, num_kv_heads=num_kv_heads, key_padding=key_padding, workspace_bytes=workspace_bytes))


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (100, 0), (17, 40), (3, -1)])
def test_several_blocks_of_queries(window):
    """Longer than a block of queries, and no multiple of it."""
    check(attention_arguments(1, 1200, num_heads=2, window=window, key_padding=torch.rand(1, 1200) < 0.8))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"out": False},
        {"out_features": 80, "residual": True},
        {"window": (-1, 0), "rotary_dim": 16, "num_kv_heads": 2},
        {"key_padding": padding(64, 30, 64, 1, total=64), "down_bias": True},
        {"ranks": (20, 20, 20, None)},
    ],
    ids=["plain", "no output", "other width", "grouped causal", "padded", "dense output"],
)
def test_rank_space_of_all_items_comes_at_once_over_the_result(how, monkeypatch):
    """Where items come one by one, and rank space fits beside what each needs."""
    implementation, together = sys.modules["flashsvd_compile.ops.attention"], []
    of_all = implementation._all_latents
    monkeypatch.setattr(implementation, "_all_latents", lambda *a: together.append(len(a[0])) or of_all(*a))
    shape = {"num_heads": 4, "head_dim": 16, "ranks": (20, 20, 20, 12), "workspace_bytes": 90_000}
    check(attention_arguments(4, 64, features=64, **(shape | how)))
    assert together == [4]


def test_bert_base_shape():
    how = {"num_heads": 12, "head_dim": 64, "ranks": (192,) * 4, "workspace_bytes": 2 << 20}
    check(attention_arguments(4, 128, features=768, key_padding=padding(128, 112, 1, 77, total=128), **how))


@pytest.fixture(params=["by themselves", "together"])
def short_items(request, monkeypatch):
    """Padding of short items is left out as that of long ones is, or masked."""
    if request.param == "by themselves":
        monkeypatch.setattr(sdpa, "WORTH_A_CALL", 0)


@pytest.mark.usefixtures("short_items")
class TestMasks:
    @pytest.mark.parametrize(
        "key_padding",
        [padding(7, 4, total=7), padding(7, 4, total=7, left=True), padding(7, 0, total=7)],
        ids=["right", "left", "none-visible"],
    )
    @pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (2, 2)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_padding_and_window(self, key_padding, window, dtype):
        check(attention_arguments(key_padding=key_padding, window=window, dtype=dtype))

    def test_holes_in_the_padding(self):
        check(attention_arguments(key_padding=torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1, 0]]).bool()))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("additive", [False, True])
    @pytest.mark.parametrize("value_dim", [8, 6])
    def test_a_query_that_sees_no_key_gives_zeros(self, dtype, additive, value_dim):
        """On the path of equal head sizes and on the other, for a padding, a window, and either kind of mask."""
        key_padding = padding(7, 4, total=7, left=True)
        mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
        mask[0, 0, 5] = False
        if additive:
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, float("-inf"))
        arguments = attention_arguments(
            out=False, key_padding=key_padding, mask=mask, window=(-1, 0), value_dim=value_dim, dtype=dtype
        )
        result = check(arguments)
        assert (result[0, 5] == 0).all()
        assert (result[1, :3] == 0).all()
        assert (result[0, 4] != 0).any()
        assert (result[1, 3] != 0).any()

    @pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (17, 0), (3, 5)])
    @pytest.mark.parametrize(
        "documents",
        [
            packed(64, 1, 100, 35, batch=3),
            packed(200, batch=3),
            packed(*[2] * 100, batch=3),
            torch.cat((packed(64, 136, batch=2), packed(100, 100))).flip(1).int(),
            torch.arange(600).view(3, 200) % 7 // 3,
            torch.arange(600).view(3, 200) % 5 > 2,
        ],
        ids=["ranges", "one", "tiny", "unlike", "interrupted", "bool"],
    )
    def test_packed_documents(self, documents, window):
        key_padding = padding(200, 150, 10, total=200)
        mask = (torch.rand(3, 1, 200, 200) < 0.7) | torch.eye(200).bool()
        check(attention_arguments(3, 200, documents=documents, window=window, rotary_dim=8))
        check(attention_arguments(3, 200, documents=documents, window=window, key_padding=key_padding, num_kv_heads=2))
        check(attention_arguments(3, 200, documents=documents, window=window, mask=mask, value_dim=6))

    def test_packed_documents_are_attended_to_as_if_alone(self):
        arguments = attention_arguments(1, 90, documents=packed(40, 50), window=(-1, 0))
        alone = [ops.attention(arguments[0][:, part], *arguments[1:-3], None, *arguments[-2:]) for part in PARTS]
        torch.testing.assert_close(ops.attention(*arguments), torch.cat(alone, dim=1))

    def test_no_keys_at_all(self):
        assert (check(attention_arguments(kv_len=0, out=False)) == 0).all()

    def test_the_most_negative_number_still_attends(self):
        """A row of finite minima is no masked row: its softmax is that of the scores, uniform after rounding."""
        mask = torch.full((7, 7), torch.finfo(torch.float32).min)
        assert (check(attention_arguments(mask=mask, out=False)) != 0).all()

    @pytest.mark.parametrize("scale", [-0.4, 0.0])
    def test_causal_window_of_scores_scaled_by_no_positive_number(self, scale):
        """PyTorch's own kernel gives NaN there."""
        arguments = [*attention_arguments(1, 200, window=(-1, 0), workspace_bytes=1 << 16)]
        arguments[SCALE] = scale
        assert check(tuple(arguments)).isfinite().all()

    def test_causal_window_equals_a_causal_mask(self):
        arguments = attention_arguments(window=(-1, 0))
        as_mask = [*arguments]
        as_mask[25], as_mask[-4] = torch.ones(7, 7).tril().bool(), -1
        torch.testing.assert_close(ops.attention(*arguments), ops.attention(*as_mask))


def test_reference_is_attention_as_written_out():
    """The specification itself, against softmax(q k^T) v spelled out in float64."""
    arguments = in_float64(attention_arguments(2, 5, bias=False, key_padding=padding(5, 3, total=5)))
    x, key_padding = arguments[0], arguments[24]
    q, k, v, out = (Projection(*arguments[start : start + 4]) for start in range(2, 18, 4))
    q, k, v = (proj.apply(x, p).unflatten(-1, (4, 8)).transpose(1, 2) for p in (q, k, v))
    scores = (q @ k.mT * 8**-0.5).masked_fill(~key_padding[:, None, None], float("-inf"))
    merged = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert relative_error(reference(*arguments), proj.apply(merged, out)) < 1e-14


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_turns_by_the_angle(interleaved):
    """Scores of rotated queries and keys depend on the difference of their angles only."""
    arguments = list(attention_arguments(1, 6, rotary_dim=8, interleaved=interleaved, dtype=torch.float64))
    pairs = torch.arange(8) // 2 if interleaved else torch.arange(8) % 4
    frequencies = 0.3 ** pairs.double()
    results = []
    for offset in (0, 5):
        angles = (torch.arange(6, dtype=torch.float64) + offset)[None, :, None] * frequencies
        arguments[26], arguments[27] = angles.cos(), angles.sin()
        results.append(ops.attention(*arguments))
    torch.testing.assert_close(*results)
    arguments[26], arguments[27] = None, None
    assert not torch.allclose(results[0], ops.attention(*arguments))


def test_inputs_are_left_alone():
    arguments = attention_arguments(rotary_dim=4, key_padding=padding(7, 4, total=7), residual=True)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    check(arguments)
    assert all(map(torch.equal, tensors, before))


def test_arguments_that_are_known_by_their_position():
    module = import_module("flashsvd_compile.ops.attention")
    positions = [module.RESIDUAL, module.WEIGHTS_OF_KEYS, module.WEIGHTS_OF_VALUES]
    assert [ops.attention._schema.arguments[at].name for at in positions] == ["residual", "k_up", "v_up"]
