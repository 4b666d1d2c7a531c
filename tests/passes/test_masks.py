"""Whatever is read off a mask, rebuilding the mask from it must give the same mask."""

import math

import pytest
import torch

from flashsvd_compile.ops.attention_region import UNLIMITED, Attention, full_mask
from flashsvd_compile.ops.projection import Projection
from flashsvd_compile.passes.masks import MaskReading, read_mask

from .capture import Captured, dynamo, exported

BATCH, HEADS, LENGTH, DIM = 3, 2, 9, 4
MIN, INF = torch.finfo(torch.float32).min, math.inf


@pytest.fixture
def query() -> torch.Tensor:
    return torch.randn(BATCH, HEADS, LENGTH, DIM)


@pytest.fixture
def padding() -> torch.Tensor:
    """Right padded, left padded, and not at all."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, 6:] = 0
    mask[1, :4] = 0
    return mask


def rebuilt(captured: Captured, reading: MaskReading) -> torch.Tensor:
    """The mask as the operator sees it, ``[batch, 1, q_len, kv_len]`` bool."""
    graph = captured.module.graph
    placeholder, query = captured.argument(lambda tensor: tensor.dim() == 4)
    with graph.inserting_before(graph.output_node()):
        vector = reading.materialize(graph, placeholder)
        numbers = None if reading.documents is None else reading.documents.build(graph, placeholder)
    key_padding = None if vector is None else captured.run(vector)
    documents = None if numbers is None else captured.run(numbers)
    assert documents is None or documents.shape == (BATCH, LENGTH)
    if key_padding is not None:
        assert key_padding.shape == (BATCH, LENGTH) and key_padding.dtype == torch.bool
    nothing = Projection(None, None, query, None)
    attention = Attention(
        q=nothing, k=nothing, v=nothing, out=None, key_padding=key_padding, mask=None, cos=None, sin=None,
        interleaved=False, q_norm=None, k_norm=None, num_heads=1, num_kv_heads=1, scale=1.0, softcap=0.0,
        window_left=reading.window_left, window_right=reading.window_right, documents=documents,
    )  # fmt: skip
    mask = full_mask(attention, slice(0, query.shape[2]), slice(0, LENGTH), query)
    return (torch.tensor(True) if mask is None else mask).expand(BATCH, 1, query.shape[2], LENGTH)


def understood(
    captured: Captured, left: int = UNLIMITED, right: int = UNLIMITED, paddings: int = 0, packed: bool = False
) -> None:
    """The mask is read completely and as expected, and the reading means the same mask."""
    mask = captured.run()
    reading = read_mask(captured.output)
    assert reading.residual is None, reading.reason
    assert (reading.window_left, reading.window_right, len(reading.key_paddings)) == (left, right, paddings)
    assert (reading.documents is not None) == packed
    again = rebuilt(captured, reading)
    visible = mask if mask.dtype == torch.bool else mask == 0
    assert torch.equal(visible.expand_as(again), again)


def left_as_it_is(captured: Captured, because: str) -> None:
    """The mask is passed on whole, with its reason."""
    reading = read_mask(captured.output)
    assert reading == MaskReading(residual=captured.output, reason=reading.reason)
    assert because in reading.reason


def indices(query, offset: int = 0):
    """``(batch, q, kv)`` as transformers makes them."""
    batch = torch.arange(query.shape[0])[:, None, None, None]
    q = (torch.arange(query.shape[2]) + offset)[None, None, :, None]
    kv = (torch.arange(LENGTH) + 0)[None, None, None, :]
    return batch, q, kv


def static(function, query, *arguments) -> Captured:
    """A graph with the query among its inputs whether the mask needs it or not."""
    return dynamo(lambda query, *arguments: (query.neg(), function(query, *arguments)), query, *arguments)


def dynamic(function, query, *arguments) -> Captured:
    """The same with symbolic sizes."""
    return dynamo(lambda query, *arguments: (query.neg(), function(query, *arguments)), query, *arguments, dynamic=True)


every_capture = pytest.mark.parametrize("capture", [static, dynamic, exported])


@every_capture
def test_a_mask_that_is_always_true_vanishes(capture, query):
    def mask(query):
        _, q, kv = indices(query)
        result = q.new_ones((), dtype=torch.bool) & (q >= 0) & (kv < LENGTH)
        return result.expand(query.shape[0], -1, query.shape[2], LENGTH)

    understood(capture(mask, query))


@every_capture
def test_causal(capture, query):
    def mask(query):
        _, q, kv = indices(query)
        return (q.new_ones((), dtype=torch.bool) & (kv <= q)).expand(query.shape[0], -1, -1, -1)

    understood(capture(mask, query), right=0)


@every_capture
def test_key_padding_by_a_gather(capture, query, padding):
    def mask(query, padding):
        batch, q, kv = indices(query)
        return (q >= 0) & padding.to(torch.bool)[batch, kv]

    understood(capture(mask, query, padding), paddings=1)


@every_capture
def test_sliding_window_and_key_padding(capture, query, padding):
    def mask(query, padding):
        batch, q, kv = indices(query)
        return (kv > q - 4) & (kv <= q) & padding.to(torch.bool)[batch, kv]

    understood(capture(mask, query, padding), left=3, right=0, paddings=1)


@every_capture
def test_a_distance_is_a_window_on_both_sides(capture, query):
    def mask(query):
        _, q, kv = indices(query)
        return (q - kv).abs() <= 2

    understood(capture(mask, query), left=2, right=2)


def test_positions_that_are_given_an_end_by_keyword(query):
    def mask(query):
        q = torch.arange(2, end=LENGTH + 2)
        return torch.arange(LENGTH)[None, :] <= q[:, None]

    understood(static(mask, query), right=2)


def test_a_window_wider_than_the_keys_vanishes(query):
    def mask(query):
        _, q, kv = indices(query)
        return (q - kv).abs() < LENGTH

    understood(static(mask, query))


def test_two_windows_are_the_narrower_one(query):
    def mask(query):
        _, q, kv = indices(query)
        return (kv <= q + 3) & (kv <= q + 1) & (q - kv <= 2)

    understood(static(mask, query), left=2, right=1)


def test_queries_that_begin_later_see_further(query):
    def mask(query):
        _, q, kv = indices(query, offset=LENGTH - 5)
        return kv <= q

    understood(static(mask, query[:, :, :5]), right=LENGTH - 5)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda padding: padding.bool()[:, None, None, :],
        lambda padding: (padding != 0).unsqueeze(1).unsqueeze(2),
        lambda padding: padding.eq(1).view(BATCH, 1, 1, LENGTH),
        lambda padding: padding.bool()[:, None, :].expand(-1, LENGTH, -1).unsqueeze(1),
        lambda padding: ~(padding == 0)[:, None, None, :],
        lambda padding: torch.logical_not(padding == 0)[:, None, None, :] & padding.new_ones((), dtype=torch.bool),
        lambda padding: torch.where((padding == 0)[:, None, None, :], -INF, 0.0),
        lambda padding: torch.zeros(BATCH, 1, 1, LENGTH).masked_fill((padding == 0)[:, None, None, :], -INF),
        lambda padding: torch.arange(LENGTH)[None, None, None] < padding.sum(-1)[:, None, None, None],
    ],
)
def test_key_padding_spelled_by_hand(spelling, query, padding):
    understood(static(lambda query, padding: spelling(padding), query, padding), paddings=1)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda: torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(),
        lambda: torch.ones(LENGTH, LENGTH).tril().bool(),
        lambda: torch.tril(torch.ones(1, 1, LENGTH, LENGTH)) == 1,
        lambda: torch.triu(torch.ones(LENGTH, LENGTH), diagonal=1) == 0,
        lambda: torch.full((LENGTH, LENGTH), -INF).triu(1),
        lambda: torch.full((LENGTH, LENGTH), MIN).triu(diagonal=1)[None, None],
        lambda: torch.zeros(LENGTH, LENGTH).masked_fill(torch.ones(LENGTH, LENGTH).tril() == 0, -INF),
        lambda: (1.0 - torch.tril(torch.ones(LENGTH, LENGTH))) * MIN,
        lambda: torch.where(torch.arange(LENGTH) <= torch.arange(LENGTH)[:, None], 0.0, MIN),
    ],
)
def test_causal_spelled_by_hand(spelling, query):
    understood(static(lambda query: spelling(), query), right=0)


def test_a_sum_of_additive_masks_is_a_conjunction(query, padding):
    def mask(query, padding):
        causal = torch.full((LENGTH, LENGTH), -INF).triu(1)
        return causal + torch.where(padding.bool(), 0.0, -INF)[:, None, None, :]

    understood(static(mask, query, padding), right=0, paddings=1)


def test_paddings_of_several_kinds_are_combined(query, padding):
    def mask(query, padding):
        batch, _, kv = indices(query)
        common = torch.tensor([True] * 7 + [False] * 2)
        dropped = padding.flip(0) == 0
        return padding.bool()[batch, kv] & common[kv] & ~dropped[:, None, None, :]

    understood(static(mask, query, padding), paddings=3)


def test_a_longer_padding_vector_is_cut_to_the_keys(query, padding):
    longer = torch.cat((torch.zeros(BATCH, 2, dtype=torch.long), padding, padding), dim=1)

    def mask(query, longer):
        batch, _, kv = indices(query)
        return longer.bool()[batch, kv + 2]

    understood(static(mask, query, longer), paddings=1)


def test_a_padding_vector_common_to_a_dynamic_batch(query):
    def mask(query, common):
        return common.bool().expand(query.shape[0], 1, query.shape[2], LENGTH)

    understood(dynamic(mask, query, torch.arange(LENGTH) > 3), paddings=1)


@every_capture
def test_packed_documents_by_gathers(capture, query, padding):
    def mask(query, documents):
        batch, q, _ = indices(query)
        kv = torch.arange(query.shape[2])[None, None, None, :]
        return (kv <= q) & (documents[batch, q] == documents[batch, kv])

    understood(capture(mask, query, padding), right=0, packed=True)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda documents: (documents[:, :, None] == documents[:, None, :])[:, None],
        lambda documents: documents.unsqueeze(1).eq(documents.unsqueeze(2)).unsqueeze(1),
        lambda documents: documents[0, None, None, :] == documents[0, None, :, None],
        lambda documents: torch.where((documents[:, None, :, None] == documents[:, None, None]), 0.0, MIN),
    ],
)
def test_packed_documents_spelled_by_hand(spelling, query, padding):
    understood(static(lambda query, documents: spelling(documents.cumsum(-1)), query, padding), packed=True)


def test_packed_documents_with_window_and_padding(query, padding):
    def mask(query, documents, padding):
        batch, q, kv = indices(query)
        documents = documents.int()
        same = documents[batch, q] == documents[batch, kv]
        return same & (kv <= q) & (kv > q - 4) & padding.bool()[batch, kv]

    understood(static(mask, query, torch.arange(27).view(3, 9) // 4, padding), left=3, right=0, paddings=1, packed=True)


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [3, 4, 5, 6, 7, 8, 9, 10, 11], [0, 1, 0, 1, 0, 1, 0, 0, 7]])


def runs(positions):
    return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)


@pytest.mark.parametrize("capture", [static, dynamic])
@pytest.mark.parametrize("positions", [POSITIONS, POSITIONS[:1]])
def test_positions_in_packed_documents_as_transformers_compares_them(capture, positions, query):
    def mask(query, positions):
        batch, q, _ = indices(query)
        positions, kv = positions.expand(query.shape[0], -1), q.mT
        documents = runs(positions)
        at_query, at_key = positions[batch, q], positions[batch, kv]
        ordered = (at_key <= at_query) & (at_key > at_query - 3)
        return ordered & (documents[batch, q] == documents[batch, kv])

    understood(capture(mask, query, positions), left=2, right=0, packed=True)


@pytest.mark.parametrize("capture", [static, dynamic])
@pytest.mark.parametrize("first", [0, 5])
def test_positions_that_count_on_are_one_document(capture, first, query):
    """What transformers makes of a decoder's default positions."""

    def mask(query):
        batch, q, kv = indices(query)
        positions = (torch.arange(query.shape[2]) + first).unsqueeze(0).expand(query.shape[0], -1)
        documents = runs(positions)
        return (kv <= q) & (documents[batch, q] == documents[batch, kv])

    understood(capture(mask, query), right=0)


@pytest.mark.parametrize(
    "broken",
    [
        lambda positions: positions * 2,
        lambda positions: positions + positions % 3,
        lambda positions: torch.cat([positions[:, 4:], positions[:, :4]], dim=1),
    ],
)
def test_positions_that_do_not_count_on_are_not_one_document(broken, query):
    def mask(query):
        batch, q, kv = indices(query)
        positions = torch.arange(query.shape[2]).unsqueeze(0).expand(query.shape[0], -1)
        documents = runs(broken(positions))
        return (kv <= q) & (documents[batch, q] == documents[batch, kv])

    understood(static(mask, query), right=0, packed=True)


def test_an_order_of_positions_without_documents_stays_a_mask(query):
    def mask(query, positions):
        batch, q, kv = indices(query)
        return positions[batch, kv] <= positions[batch, q]

    left_as_it_is(static(mask, query, POSITIONS), "an order")


@pytest.mark.parametrize(
    "other_runs",
    [
        lambda positions: (torch.diff(positions, prepend=positions[:, :1]) != 0).cumsum(-1),
        lambda positions: (torch.diff(positions, prepend=positions[:, :1]) != 1).cumsum(0),
        lambda positions: runs(positions * 2),
    ],
)
def test_an_order_of_positions_in_other_documents_stays_a_mask(other_runs, query):
    def mask(query, positions):
        batch, q, kv = indices(query)
        documents = other_runs(positions)
        return (positions[batch, kv] <= positions[batch, q]) & (documents[batch, q] == documents[batch, kv])

    left_as_it_is(static(mask, query, POSITIONS), "an order")


def test_documents_of_fewer_queries_than_keys_stay_a_mask(query, padding):
    def mask(query, documents):
        batch, q, kv = indices(query)
        return documents[batch, q] == documents[batch, kv]

    left_as_it_is(static(mask, query[:, :, :5], padding), "not documents")


def test_documents_of_another_order_stay_a_mask(query, padding):
    def mask(query, documents):
        batch, q, kv = indices(query)
        return documents[batch, LENGTH - 1 - q] == documents[batch, kv]

    left_as_it_is(static(mask, query, padding), "not a vector over the keys")


@pytest.mark.parametrize("on", [False, True])
def test_a_mask_that_is_dropped_at_random_is_read_only_without(on, query):
    def mask(query):
        return torch.nn.functional.dropout(torch.ones(LENGTH, LENGTH), 0.4, on) > 0

    if on:
        left_as_it_is(static(mask, query), "not a vector over the keys")
    else:
        understood(static(mask, query))


def test_floats_that_are_equal_stay_a_mask(query):
    def mask(query, numbers):
        return (numbers[:, :, None] == numbers[:, None, :])[:, None]

    left_as_it_is(static(mask, query, torch.rand(BATCH, LENGTH)), "not documents")


def test_documents_packed_in_two_ways_stay_a_mask(query, padding):
    def mask(query, documents, others):
        batch, q, kv = indices(query)
        return (documents[batch, q] == documents[batch, kv]) & (others[batch, q] == others[batch, kv])

    left_as_it_is(static(mask, query, padding, padding.flip(0)), "two ways")


def test_an_unknown_offset_stays_a_mask(query):
    def mask(query, prefix):
        _, q, kv = indices(query)
        return kv <= q + prefix.shape[0]

    left_as_it_is(dynamic(mask, query, torch.ones(5)), "offset")


def test_a_strictly_causal_mask_stays_a_mask(query):
    def mask(query):
        _, q, kv = indices(query)
        return kv < q

    left_as_it_is(static(mask, query), "offset -1")


def test_a_disjunction_stays_a_mask(query, padding):
    def mask(query, padding):
        batch, q, kv = indices(query)
        return (kv <= q) | padding.bool()[batch, kv]

    left_as_it_is(static(mask, query, padding), "not a vector over the keys")


def test_chunks_stay_a_mask(query):
    def mask(query):
        _, q, kv = indices(query)
        return (kv // 4 == q // 4) & (kv <= q)

    left_as_it_is(static(mask, query), "")


def test_a_mask_over_queries_stays_a_mask(query, padding):
    def mask(query, padding):
        return padding.bool()[:, None, :, None].expand(-1, 1, -1, LENGTH)

    left_as_it_is(static(mask, query, padding), "not a vector over the keys")


def test_a_bias_stays_a_mask(query):
    def mask(query):
        return torch.arange(LENGTH, dtype=torch.float32).expand(1, 1, LENGTH, LENGTH) * -0.5

    left_as_it_is(static(mask, query), "no rule explains")


@pytest.mark.parametrize("low", [MIN, -1e4])
def test_finite_padding_stays_a_mask_because_a_row_may_be_masked_completely(low, query, padding):
    def mask(query, padding):
        return (1.0 - padding.bool()[:, None, None, :].float()) * low

    left_as_it_is(static(mask, query, padding), "masked completely" if low == MIN else "other levels")


WRITTEN = {
    "all": lambda mask: mask[:, :],
    "every second row": lambda mask: mask[::2],
    "a half": lambda mask: mask.chunk(2)[0],
    "a row": lambda mask: mask.unbind(0)[1],
    "a diagonal": lambda mask: mask.diagonal(1),
    "windows": lambda mask: mask.unfold(0, 2, 2),
    "by strides": lambda mask: mask.as_strided((2, 2), (1, 1)),
    "as other numbers": lambda mask: mask.view(torch.int32),
}


@pytest.mark.parametrize("part", WRITTEN)
def test_a_mask_written_in_place_stays_a_mask(part, query):
    def mask(query):
        mask = torch.zeros(LENGTH, LENGTH).masked_fill(torch.arange(LENGTH) > torch.arange(LENGTH)[:, None], -INF)
        WRITTEN[part](mask).fill_(0)
        return mask

    left_as_it_is(static(mask, query), "written in place")


@pytest.mark.parametrize(
    "condition",
    [
        lambda i, j: (i - j) * (i - j) <= 4,
        lambda i, j: j * j <= i * i,
        lambda i, j: (i - j) ** 2 <= 4,
        lambda i, j: (i - j).abs() * j <= 4,
        lambda i, j: j * i <= 12,
    ],
)
def test_conditions_that_are_not_linear_are_left_as_they_are(condition):
    def mask(query):
        i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
        return query.sum(), condition(i, j)

    captured = dynamo(mask, torch.randn(BATCH, HEADS, LENGTH, DIM))
    assert read_mask(captured.output).residual is not None
