"""Transient memory of a region in bytes: as the model writes it, and under each strategy.

Every formula is a sympy expression in the graph's symbols. "As written" is the sum of what is alive at the worst moment
when each operation allocates its result, which is what eager execution does.
"""

from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import NamedTuple

import sympy

from .device import Device
from .shapes import AttentionShape, LinearShape, MlpShape, RegionShape, is_bound_by_launches

SHORT_KEYS = 128
"""Keys up to which attention lifts them where it uses them."""
NOTHING: Mapping[str, sympy.Expr | int] = MappingProxyType({})
"""No merged projections."""


def linear_as_written(shape: LinearShape) -> sympy.Expr:
    """The rank-space intermediate."""
    return shape.itemsize * shape.rows * shape.latent("w")


def merged_weight(shape: LinearShape) -> sympy.Expr:
    """The factors' product."""
    return sympy.sympify(shape.itemsize * shape.in_features * shape.features["w"])


def products(shape: RegionShape, device: Device, to_merge: Mapping[str, sympy.Expr | int] = NOTHING) -> int:
    """Bytes beside the workspace of what is made of factors: the dense weights of the region's merged projections,
    ``to_merge`` by role with their input size, and of those that the graph multiplies out; an attention's
    :func:`copied_factors`.

    An attention operator multiplies for the queries first, then for keys and values, then for its output; the rest
    exists all at once.

    Not counted on a CPU, where a workspace is bounded by the cache and not by what memory is left.
    """
    if not device.grows:
        return 0
    weights = {role: int(shape.features[role] * features) for role, features in to_merge.items()}
    if not isinstance(shape, AttentionShape):
        return shape.itemsize * sum(weights.values())
    made = _copies(shape, device) | weights
    together = made["k"] + made["v"]
    if _lifts_by_library(shape, device) and not to_merge:
        together += made["q"]  # of a normalised input all three are copied at once
    return shape.itemsize * (shape.products + max(together, made["q"], made.get("out", 0)))


ALIGNED, STEP = 16, 8
"""Elements of half precision in 32 and in 16 bytes (``ops/aligned.py``)."""
LEAST_COPIED = 64
"""Rows for which factors of odd rank are copied."""


def copied_factors(shape: RegionShape, role: str, in_features: sympy.Expr | int, rows: sympy.Expr) -> int:
    """Elements of copies of a projection's factors, which the library is given where their rank is odd.

    Kernels of ours are given one of the second factor, whose rows are of that rank: ``in_features`` 0.
    """
    rank = shape.latent(role)
    if rank % STEP == 0 or shape.itemsize != 2 or shape.at_hints(rows) < LEAST_COPIED:
        return 0
    return -(-rank // ALIGNED) * ALIGNED * int(shape.features[role] + in_features)


def _copies(shape: AttentionShape, device: Device) -> dict[str, int]:
    """Elements of :func:`copied_factors` by role."""
    copies = {}
    for role in shape.ranks:
        beyond = shape.latent(role) > device.max_projected_rank
        by_library = beyond if role == "out" else beyond or _lifts_by_library(shape, device)
        in_features = heads_width(shape) if role == "out" else shape.in_features
        copies[role] = copied_factors(shape, role, in_features if by_library else 0, shape.rows_of(role))
    return copies


def _lifts_by_library(shape: AttentionShape, device: Device) -> bool:
    """Whether keys and values may go through the library, as they do where the input is normalised, and the queries
    with them.
    """
    return max(shape.latent("k"), shape.latent("v")) > device.max_projected_rank


def mlp_as_written(shape: MlpShape) -> sympy.Expr:
    """The hidden tensor with its activation; with a gate both factors and their product."""
    return shape.itemsize * shape.rows * (1 + len(shape.into_hidden)) * shape.features["hidden"]


def mlp_fused(shape: MlpShape, device: Device, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """Rank-space input and partial sums of the fused core, beside the result, which comes when they are gone; and
    copies of factors of odd rank.
    """
    rank_in, rank_out = shape.latent("hidden"), shape.latent("out")
    beside = rank_in + rank_out * partial_sums(shape, device, workspace_bytes) - shape.features["out"]
    inputs = {"hidden": shape.in_features, "out": shape.features["hidden"]}
    copies = sum(copied_factors(shape, role, in_features, shape.rows) for role, in_features in inputs.items())
    return shape.itemsize * (shape.rows * sympy.Max(beside, rank_out) + copies)


SHARE_FOR_PARTIAL_SUMS = Fraction(3, 5)
"""Share of the input that partial sums may take beside the result."""


SPLIT_COLUMNS = 64
"""Least columns of the hidden layer that a partial sum is of."""


def partial_sums(shape: MlpShape, device: Device, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """Parts of the hidden layer that are computed side by side where rows are too few to fill the device; not where a
    kernel for fewer still computes the region.
    """
    if is_bound_by_launches(shape.rows):
        return sympy.S.One
    rows = maximum(1, shape.rows)
    of_a_row = shape.features["out"] - shape.latent("hidden") + workspace_bytes / (shape.itemsize * rows)
    fitting, needed = floor(of_a_row / shape.latent("out")), floor(device.full_rows / rows)
    return maximum(1, minimum(fitting, needed, -(-shape.features["hidden"] // SPLIT_COLUMNS)))


SINGLE_COLUMNS = 768
"""Columns of a float32 hidden layer that a GPU computes at a time, so that many rows fit a workspace."""


def mlp_streamed(shape: MlpShape, device: Device, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """The workspace of one chunk of rows; all of the workspace where some columns pass at a time."""
    chunk = sympy.ceiling(shape.rows / mlp_chunks(shape, device, workspace_bytes)) * _mlp_streamed_row(shape)
    return minimum(workspace_bytes, chunk) if _columns(shape, device) < shape.features["hidden"] else chunk


def mlp_chunks(shape: MlpShape, device: Device, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """Chunks of rows, evenly cut."""
    fitting = sympy.Max(1, sympy.floor(workspace_bytes / _mlp_streamed_row(shape, _columns(shape, device))))
    return sympy.ceiling(shape.rows / fitting)


def _columns(shape: MlpShape, device: Device) -> int:
    """Least of the hidden layer that is computed at a time; sums of half precision are not stored in between."""
    width = shape.features["hidden"]
    return min(width, SINGLE_COLUMNS) if device.grows and shape.itemsize == 4 else width


def _mlp_streamed_row(shape: MlpShape, columns: int | None = None) -> int:
    """Bytes of one row: ``columns`` of its hidden layer, or all, and what of its rank space does not fit where its
    result goes.
    """
    room = shape.features["out"] if shape.ranks["out"] is not None else 0
    beside = 0
    for rank in (shape.latent(role) for role in (*shape.into_hidden, "out")):
        room, beside = (room - rank, beside) if rank <= room else (room, beside + rank)
    hidden = len(shape.into_hidden) * (columns or shape.features["hidden"])
    return shape.itemsize * (beside + max(hidden, shape.latent("out")))


def attention_as_written(shape: AttentionShape) -> sympy.Expr:
    """q, k, v and the concatenated heads."""
    queries, keys = shape.batch * shape.q_len, shape.batch * shape.kv_len
    merged = heads_width(shape)
    elements = queries * (shape.features["q"] + merged) + keys * (shape.features["k"] + shape.features["v"])
    return shape.itemsize * elements


def shared(shape: AttentionShape) -> sympy.Expr:
    """Queries, keys or values that exist whichever way the region is computed."""
    elements = (shape.rows_of(role) * shape.features[role] for role in shape.shared)
    return shape.itemsize * sum(elements, sympy.S.Zero)


def attention_streamed(shape: AttentionShape, device: Device, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """The workspace, or as much of it as chunks of even size take; where the output projection changes the width, it
    holds the heads too, at least those of one item and one head of keys and values.
    """
    if heads_in_place(shape):
        return attention_chunks(shape, device, workspace_bytes).bytes if device.grows else workspace_bytes
    one_head = (shape.features["k"] + shape.features["v"]) // shape.num_kv_heads
    least = shape.q_len * heads_width(shape) + shape.kv_len * one_head
    return sympy.Max(workspace_bytes, shape.itemsize * least)


class Chunks(NamedTuple):
    """Keys and values as they pass through a workspace: how many chunks, and the bytes of the largest."""

    number: sympy.Expr
    bytes: sympy.Expr


def attention_chunks(shape: AttentionShape, device: Device, workspace_bytes: sympy.Expr) -> Chunks:
    """Whole items where one fits, else heads of one item; rank space that passes through memory is in it, too, and what
    the library returns, where it attends in float32.

    Evenly cut: 32 items of which 9 fit come by eights, 12 heads of which 9 fit by sixes.
    """
    latent = shape.itemsize * shape.kv_len * (shape.latent("k") + shape.latent("v"))
    latent = 0 if lifts_on_chip(shape, device) else latent
    width = (shape.features["k"] + shape.features["v"]) // shape.num_kv_heads
    returned = shape.q_len * shape.features["v"] // shape.num_kv_heads if library_attends(shape, device) else 0
    head = maximum(1, shape.itemsize * (shape.kv_len * width + returned))
    items = maximum(1, floor(workspace_bytes / (latent + shape.num_kv_heads * head)))
    heads = maximum(1, floor((workspace_bytes - latent) / head))
    of_items = maximum(1, ceiling(shape.batch / items))
    of_heads = ceiling(shape.num_kv_heads / heads)
    most = latent + ceiling(shape.num_kv_heads / of_heads) * head
    return Chunks(of_items * of_heads, ceiling(shape.batch / of_items) * most)


def maximum(*values) -> sympy.Expr:
    """Their maximum. Of symbols it is not simplified, which takes up to a second where chunks are in it."""
    return _unsimplified(sympy.Max, *values)


def minimum(*values) -> sympy.Expr:
    """Their minimum, as :func:`maximum`."""
    return _unsimplified(sympy.Min, *values)


def ceiling(value) -> sympy.Expr:
    """The next integer, as :func:`maximum`."""
    return _unsimplified(sympy.ceiling, value)


def floor(value) -> sympy.Expr:
    """The integer before, as :func:`maximum`."""
    return _unsimplified(sympy.floor, value)


def _unsimplified(function, *values) -> sympy.Expr:
    expressions = [sympy.sympify(value) for value in values]
    return function(*expressions, evaluate=all(value.is_number for value in expressions))


def lifts_on_chip(shape: AttentionShape, device: Device) -> bool:
    """Whether a kernel takes keys and values out of rank space; float32 is left to the library."""
    ranks = [shape.ranks[role] for role in ("k", "v")]
    limit = device.max_fused_rank if is_short(shape) else device.max_projected_rank
    return shape.itemsize == 2 and all(rank is not None and rank <= limit for rank in ranks)


def is_short(shape: AttentionShape) -> bool:
    """Whether keys and values stay in rank space until they are used."""
    return shape.at_hints(shape.kv_len) <= SHORT_KEYS


def library_attends(shape: AttentionShape, device: Device) -> bool:
    """Whether heads come back from the library's attention: on a GPU in float32, where no kernel of ours is faster,
    unless key heads are shared.
    """
    wide = shape.features["q"] > device.max_single_head * shape.num_heads
    return shape.itemsize == 4 and shape.num_heads == shape.num_kv_heads and wide


def attention_absorbed(shape: AttentionShape, device: Device, workspace_bytes: sympy.Expr) -> sympy.Expr:
    """The absorbed form's workspace and its weights."""
    absorbed = shape.absorbed
    transient = sympy.Min(attention_streamed(absorbed, device, workspace_bytes), attention_as_written(absorbed))
    elements = (shape.latent("q") or shape.in_features) * absorbed.features["q"]
    elements += (shape.latent("out") or shape.features["out"]) * heads_width(absorbed)
    elements += shape.in_features * (absorbed.features["k"] + absorbed.features["v"])
    return transient + shape.itemsize * elements


def keys_and_values(shape: AttentionShape) -> sympy.Expr:
    """Keys and values out of rank space, which pass through the workspace."""
    return shape.itemsize * shape.batch * shape.kv_len * (shape.features["k"] + shape.features["v"])


def heads_in_place(shape: AttentionShape) -> bool:
    """Whether queries, heads and result share one memory."""
    return shape.features.get("out", heads_width(shape)) == heads_width(shape)


def heads_width(shape: AttentionShape) -> int:
    """Features of the concatenated heads."""
    return shape.features["v"] // shape.num_kv_heads * shape.num_heads
