"""Whatever is read as a rotation must be the rotation that the operator computes."""

import pytest
import torch
from torch import Tensor

from flashsvd_compile.ops.attention_region import Attention, rotate
from flashsvd_compile.ops.projection import Projection
from flashsvd_compile.passes.rope import read_rope

from .capture import Captured, dynamo, exported

BATCH, HEADS, LENGTH, DIM = 2, 3, 5, 8
HALF = DIM // 2


def tables(width: int = DIM, batch: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[batch, len, width]``; no column equals another, so that a wrong column shows."""
    return torch.randn(batch, LENGTH, width, dtype=dtype), torch.randn(batch, LENGTH, width, dtype=dtype)


def queries(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (BATCH, HEADS, LENGTH, DIM)), dtype=dtype)


def rotates(captured: Captured, interleaved: bool = False, heads_dim: int = 1) -> None:
    """The result is read as a rotation, and that rotation has the same result."""
    graph = captured.module.graph
    rope = read_rope(captured.output, heads_dim)
    assert rope is not None
    assert rope.interleaved == interleaved
    assert rope.nodes[-1] is captured.output and rope.source not in rope.nodes
    expected = captured.run()
    with graph.inserting_before(graph.output_node()):
        cos, sin = rope.cos.build(graph), rope.sin.build(graph)
    graph.output_node().args = ((rope.source, cos, sin),)
    captured.module.recompile()
    source, cos, sin = captured.module(*captured.inputs)
    assert cos.dim() == sin.dim() == 3
    nothing = Projection(None, None, source, None)
    attention = Attention(
        q=nothing, k=nothing, v=nothing, out=None, key_padding=None, mask=None, cos=cos, sin=sin,
        interleaved=interleaved, q_norm=None, k_norm=None, num_heads=1, num_kv_heads=1, scale=1.0, softcap=0.0,
        window_left=-1, window_right=-1,
    )  # fmt: skip
    heads = source if heads_dim == 1 else source.transpose(1, 2)
    again = rotate(heads, attention).to(source.dtype)
    torch.testing.assert_close(again if heads_dim == 1 else again.transpose(1, 2), expected, rtol=0, atol=0)


def dynamic(function, x: Tensor, *tables: Tensor) -> Captured:
    """A graph with symbolic batch and length."""
    torch._dynamo.mark_dynamic(x, (0, 2))
    for table in tables:
        torch._dynamo.mark_dynamic(table, 1)
    return dynamo(function, x, *tables)


every_capture = pytest.mark.parametrize("capture", [dynamo, dynamic, exported])


def turned_halves(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def turned_neighbours(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + turned_halves(x) * sin.unsqueeze(1)


def halves_by_chunk(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1) * sin[:, None] + x * cos[:, None]


def halves_by_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = torch.split(x, [HALF, HALF], dim=-1)
    return torch.add(cos.unsqueeze(1) * x, torch.cat([second.neg(), first], -1).mul(sin.unsqueeze(1)))


def halves_by_unbind(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.reshape(*x.shape[:-1], 2, HALF).unbind(dim=-2)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + turned_neighbours(x) * sin.unsqueeze(1)


def neighbours_by_view(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.view(*x.shape[:-1], HALF, 2).unbind(-1)
    return x * cos.unsqueeze(1) + torch.stack((-odd, even), -1).reshape(x.shape) * sin.unsqueeze(1)


@every_capture
@pytest.mark.parametrize("spelling", [halves, halves_by_chunk, halves_by_split, halves_by_unbind])
def test_halves(capture, spelling):
    rotates(capture(spelling, queries(), *tables()))


@every_capture
@pytest.mark.parametrize("spelling", [neighbours, neighbours_by_view])
def test_neighbours(capture, spelling):
    rotates(capture(spelling, queries(), *tables()), interleaved=True)


def test_tables_of_each_batch_item():
    rotates(dynamo(halves, queries(), *tables(batch=BATCH)))


@pytest.mark.parametrize(
    ("make_room", "shape"),
    [
        (lambda table: table, (LENGTH, DIM)),
        (lambda table: table[None], (LENGTH, DIM)),
        (lambda table: table[None, None], (LENGTH, DIM)),
        (lambda table: table, (1, LENGTH, DIM)),
        (lambda table: table * 1.5, (BATCH, 1, LENGTH, DIM)),
        (lambda table: table.view(1, 1, LENGTH, DIM), (LENGTH, DIM)),
    ],
)
def test_tables_of_other_ranks(make_room, shape):
    def spelling(x, cos, sin):
        return x * make_room(cos) + turned_halves(x) * make_room(sin)

    rotates(dynamo(spelling, queries(), torch.randn(shape), torch.randn(shape)))


def test_tables_of_half_the_width_for_halves():
    def spelling(x, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    rotates(dynamo(spelling, queries(), *tables(HALF)))


def test_tables_of_half_the_width_for_neighbours():
    def spelling(x, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    rotates(dynamo(spelling, queries(), *tables(HALF)), interleaved=True)


@pytest.mark.parametrize("capture", [dynamo, exported])
@pytest.mark.parametrize("turned", [turned_halves, turned_neighbours])
def test_partial_rotation(capture, turned):
    def spelling(x, cos, sin):
        rotated, passed = x[..., :4], x[..., 4:]
        rotated = rotated * cos.unsqueeze(1) + turned(rotated) * sin.unsqueeze(1)
        return torch.cat((rotated, passed), dim=-1)

    rotates(capture(spelling, queries(), *tables(4)), interleaved=turned is turned_neighbours)


def test_partial_rotation_of_all_columns():
    def spelling(x, cos, sin):
        return torch.cat([halves(x[..., :DIM], cos, sin), x[..., DIM:]], dim=-1)

    rotates(dynamo(spelling, queries(), *tables()))


def test_positions_before_heads_with_tables_repeated_for_neighbours():
    def spelling(x, cos, sin):
        cos = torch.repeat_interleave(cos[:, :, None, :], 2, 3)
        sin = torch.repeat_interleave(sin[:, :, None, :], 2, 3)
        return x * cos + turned_neighbours(x) * sin

    captured = dynamo(spelling, queries(BATCH, LENGTH, HEADS, DIM), *tables(HALF))
    rotates(captured, interleaved=True, heads_dim=2)


def test_sines_and_cosines_in_one_table():
    def spelling(x, both):
        sin, cos = both.chunk(2, dim=-1)
        sin, cos = torch.stack((sin, sin), dim=-1).reshape_as(both), torch.stack((cos, cos), dim=-1).reshape_as(both)
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).reshape_as(x)
        return x * cos + turned * sin

    rotates(dynamo(spelling, queries(), torch.randn(1, 1, LENGTH, DIM)), interleaved=True)


def test_a_rotation_in_float64_is_refused():
    def spelling(x, cos, sin):
        return halves(x.double(), cos, sin).float()

    assert read_rope(dynamo(spelling, queries(), *tables()).output) is None


def test_queries_and_keys_have_equal_tables():
    def spelling(q, k, cos, sin):
        return halves(q, cos, sin), halves(k, cos, sin)

    captured = dynamo(spelling, queries(), queries(BATCH, 1, LENGTH, DIM), *tables())
    q, k = (read_rope(node) for node in captured.outputs)
    assert q is not None and k is not None
    assert (q.cos, q.sin, q.interleaved) == (k.cos, k.sin, k.interleaved)


def test_a_slice_of_packed_heads_is_the_source():
    def spelling(packed, cos, sin):
        return halves(packed.chunk(3, dim=-1)[1], cos, sin)

    captured = dynamo(spelling, queries(BATCH, HEADS, LENGTH, 3 * DIM), *tables())
    rotates(captured)


def test_the_norm_of_queries_is_no_part_of_the_rotation():
    def whole(x, weight, cos, sin):
        return halves(x * weight, cos, sin)

    def partial(x, weight, cos, sin):
        normed = x * weight
        return torch.cat((halves(normed[..., :4], cos, sin), normed[..., 4:]), dim=-1)

    rotates(dynamo(whole, queries(), torch.randn(DIM), *tables()))
    rotates(dynamo(partial, queries(), torch.randn(DIM), *tables(4)))


def test_a_rotation_in_float32_of_bfloat16_heads():
    def spelling(x, cos, sin):
        return halves(x.float(), cos, sin).type_as(x)

    rotates(dynamo(spelling, queries(dtype=torch.bfloat16), *tables()))
    rotates(dynamo(spelling, queries(dtype=torch.bfloat16), *tables(dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x, cos, sin: halves(x.float(), cos, sin),
        lambda x, cos, sin: halves(x, cos, sin).float(),
    ],
)
def test_a_rotation_that_ends_in_another_dtype_is_refused(spelling):
    assert read_rope(dynamo(spelling, queries(dtype=torch.bfloat16), *tables(dtype=torch.bfloat16)).output) is None


def test_rounding_before_the_rotation_is_kept():
    rotates(dynamo(lambda x, cos, sin: halves(x.bfloat16(), cos, sin), queries(), *tables(dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    "spelling",
    [
        pytest.param(lambda x, cos, sin: x * cos[:, None] - turned_halves(x) * sin[:, None], id="turned back"),
        pytest.param(lambda x, cos, sin: x * cos[:, None] + x.flip(-1) * sin[:, None], id="other pairs"),
        pytest.param(lambda x, cos, sin: x * cos[:, None] + x * sin[:, None], id="no pairs"),
        pytest.param(lambda x, cos, sin: turned_halves(x) * cos[:, None] + x.neg() * sin[:, None], id="negated"),
        pytest.param(lambda x, cos, sin: x * cos[:, None], id="scaled"),
        pytest.param(lambda x, cos, sin: x + turned_halves(x), id="without tables"),
        pytest.param(lambda x, cos, sin: torch.cat((halves(x, cos, sin)[..., :4], x[..., :4]), -1), id="repeated"),
        pytest.param(lambda x, cos, sin: halves(x, cos, sin) + sin[:, None], id="a table is added"),
        pytest.param(lambda x, cos, sin: halves(x, cos, sin) + x * x, id="a square is added"),
        pytest.param(
            lambda x, cos, sin: torch.cat((halves(x[..., :4], cos[..., :4], sin[..., :4]), x.relu()[..., 4:]), -1),
            id="what is not rotated is activated",
        ),
        pytest.param(
            lambda x, cos, sin: torch.view_as_real(
                torch.view_as_complex(x.reshape(*x.shape[:-1], HALF, 2)) * torch.complex(cos, sin)[:, None, :, :HALF]
            ).flatten(-2),
            id="complex",
        ),
    ],
)
def test_what_is_no_rotation(spelling):
    assert read_rope(dynamo(spelling, queries(), *tables()).output) is None


def test_tables_that_differ_between_heads_are_refused():
    def spelling(x, cos, sin):
        return x * cos + turned_halves(x) * sin

    table = torch.randn(1, HEADS, LENGTH, DIM)
    assert read_rope(dynamo(spelling, queries(), table, table).output) is None


PARTS = {
    "the first positions": (lambda table: table[:LENGTH], (2 * LENGTH, DIM)),
    "one of two tables": (lambda table: table[1], (BATCH, LENGTH, DIM)),
    "the last item": (lambda table: table[1:], (BATCH, LENGTH, DIM)),
    "the first of a pair": (lambda table: table.unbind(0)[0], (BATCH, LENGTH, DIM)),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_larger_tables(part):
    take, shape = PARTS[part]

    def spelling(x, cos, sin):
        return x * take(cos) + turned_halves(x) * take(sin)

    rotates(dynamo(spelling, queries(), torch.randn(shape), torch.randn(shape)))
